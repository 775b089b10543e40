"""A resize, as every rank carries it out: merge, sync, redistribute, split, commit.

All ranks call the same collectives in the same order; the newcomers come in at the merge, the leavers go after the commit.
Until then nothing of the old generation is given up, so that a resize in which somebody is lost can be rolled back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from .. import faults
from ..comm.world import World
from ..model import Generation, Member
from .plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..comm.arrival import Arrivals
    from ..comm.door import Door
    from ..comm.messages import Party
    from ..comm.waiting import Watch
    from ..redistribute import DistributedArray
    from ..state import Registry


@dataclass
class Stages:
    """Seconds spent, by the stage's name."""

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a ``with`` block for the stage `name`."""
        begun = self.clock()
        try:
            faults.at(name)
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - begun


@dataclass
class Transition:
    """The change from one generation to the next.

    Parameters
    ----------
    registry : Registry
        State that newcomers receive.
    arrays : sequence of DistributedArray
        Arrays to redistribute.
    stages : Stages
        Where times are counted.
    old : World, optional
        The generation before; none in a newcomer.

    Attributes
    ----------
    plan : Plan
        What is carried out.
    merged : World
        Members and newcomers together.
    settled : World
        The new generation; None on a leaver.
    prepared : bool
        True from when this rank lacks nothing for the new generation and waits for the others only.
    """

    registry: Registry
    arrays: Sequence[DistributedArray]
    stages: Stages
    old: World | None = None
    plan: Plan | None = None
    merged: World | None = None
    settled: World | None = None
    prepared: bool = False
    state_bytes: int = 0
    moved_bytes: int = 0

    def __post_init__(self) -> None:
        self._saved = [array.saved() for array in self.arrays]

    @property
    def joining(self) -> tuple[Member, ...]:
        """The newcomers."""
        return self.plan.members[len(self.plan.members) - self.plan.joining :] if self.plan is not None else ()

    def of_member(self, plan: Plan, arrivals: Arrivals | None) -> None:
        """Carry out `plan` on a member; `arrivals` on the leader alone."""
        assert self.old is not None
        self.plan, self.merged = plan, self.old
        if plan.joining:
            with self.stages.stage("merge"):
                self.old.barrier()  # ranks that come early wait here, where they can leave
                party = arrivals.enter() if arrivals is not None else None
                self.merged = self.old.merge(party, self.joining)
            with self.stages.stage("sync"):
                if party is not None:
                    channel = _channel(party, self.old.watch)
                    channel.tell(msgspec.msgpack.encode(plan))
                    self.state_bytes = self.registry.send(channel)
        self._settle(plan)

    def of_newcomer(self, door: Door, watch: Watch, told: Callable[[Plan], None]) -> None:
        """Enter through `door`, receive the plan, for `told`, and the state, and carry out the rest of the plan."""
        with self.stages.stage("merge"):
            comm, party = door.enter()
        with self.stages.stage("sync"):
            channel = _channel(party, watch)
            plan = self.plan = msgspec.msgpack.decode(channel.tell(None), type=Plan)
            told(plan)
            self.registry.receive(channel)
        self.merged = World(comm, Generation(plan.generation - 1, plan.members), watch)
        forms = {form.name: form for form in plan.forms}
        for array in self.arrays:
            array.adopt(forms[array.name], self.merged.rank)
        self._settle(plan)

    def _settle(self, plan: Plan) -> None:
        merged = self.merged
        assert merged is not None
        kept = [rank for rank in range(merged.size) if rank not in plan.leavers]
        with self.stages.stage("redistribute"):
            for array in self.arrays:
                self.moved_bytes += array.redistribute(merged, kept)
        if plan.leavers:
            with self.stages.stage("split"):
                self.settled = merged.split(plan.leavers)
        else:
            self.settled = merged
        with self.stages.stage("commit"):
            merged.barrier()  # who was lost until here is noticed where it can be, and not in the calls that follow
            if self.settled is not None:
                self.settled.generation = Generation(plan.generation, self.settled.generation.members)
                self.settled.open_user()
            self.prepared = True
            merged.barrier()

    def tidy(self) -> World | None:
        """Free what only the old generation needed, once the new one is committed; return what sleeping ranks hold on to."""
        assert self.plan is not None
        tether: World | None = None
        if self.plan.parks:
            tether = self.merged
        if self.merged is not None and self.merged not in (tether, self.settled, self.old):
            self.merged.close()
        if self.old is not None:
            if self.old is tether:
                self.old.close_user()
            else:
                self.old.close()
        return tether

    def roll_back(self) -> None:
        """Let the arrays be again as before. The communicators made so far are left: some of their messages never come."""
        for array, saved in zip(self.arrays, self._saved, strict=True):
            array.restore(saved)


def _channel(party: Party, watch: Watch) -> World:
    return World(party.group, Generation(-1, ()), watch)
