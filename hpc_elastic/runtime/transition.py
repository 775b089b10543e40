"""A resize, as every rank carries it out: merge, sync, redistribute, split, resume.

All ranks call the same collectives in the same order; the newcomers come in at the merge, the leavers go after the split.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from ..comm.world import World
from ..model import Generation
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
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - begun


@dataclass
class Outcome:
    """What a transition led to on this rank; `world` is None on a leaver, `tether` the old world where some are parked."""

    world: World | None
    tether: World | None
    state_bytes: int
    moved_bytes: int


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
    """

    registry: Registry
    arrays: Sequence[DistributedArray]
    stages: Stages

    def of_member(self, world: World, plan: Plan, arrivals: Arrivals | None) -> Outcome:
        """Carry out `plan` on a member; `arrivals` on the leader alone."""
        state_bytes = 0
        if plan.joining:
            with self.stages.stage("merge"):
                party = arrivals.enter() if arrivals is not None else None
                merged = world.merge(party)
                world.close()
            with self.stages.stage("sync"):
                if party is not None and arrivals is not None:
                    channel = _channel(party, world.watch)
                    channel.tell(msgspec.msgpack.encode(plan))
                    state_bytes = self.registry.send(channel)
                    arrivals.close()
        else:
            merged = world
        return self._settle(merged, plan, state_bytes)

    def of_newcomer(self, door: Door, watch: Watch) -> tuple[Plan, Outcome]:
        """Enter through `door`, receive the plan and the state, and carry out the rest of the plan."""
        with self.stages.stage("merge"):
            comm, party = door.enter()
        with self.stages.stage("sync"):
            channel = _channel(party, watch)
            plan = msgspec.msgpack.decode(channel.tell(None), type=Plan)
            self.registry.receive(channel)
            door.close()
        merged = World(comm, Generation(plan.generation - 1, plan.members), watch)
        forms = {form.name: form for form in plan.forms}
        for array in self.arrays:
            array.adopt(forms[array.name], merged.rank)
        return plan, self._settle(merged, plan, 0)

    def _settle(self, merged: World, plan: Plan, state_bytes: int) -> Outcome:
        merged.generation = Generation(plan.generation, plan.members)
        kept = [rank for rank in range(merged.size) if rank not in plan.leavers]
        with self.stages.stage("redistribute"):
            moved = sum(array.redistribute(merged, kept) for array in self.arrays)
        tether: World | None = None
        settled: World | None = merged
        if plan.leavers:
            with self.stages.stage("split"):
                settled = merged.split(plan.leavers)
                if plan.parks:
                    tether = merged
                else:
                    merged.close()
        if settled is not None:
            with self.stages.stage("resume"):
                settled.open_user()
        return Outcome(settled, tether, state_bytes, moved)


def _channel(party: Party, watch: Watch) -> World:
    return World(party.group, Generation(-1, ()), watch)
