"""What people and ranks ask of a running job through its inbox: a size, a checkpoint, to leave, to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .. import events
from ..errors import ResizeRefused
from ..model import Request, Resize
from ..policy import check
from ..rundir import Answer

if TYPE_CHECKING:
    from .leader import Leader
    from .reports import Here

INBOX_EVERY_S = 0.1
ALL_TOLD_S = 0.5  # how long after the first rank was told to leave the others may be told as well: then the job stops


class Inbox:
    """Reads requests for a leader. What can't be done at once goes into the office, for the next leader as well."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._told_since: float | None = None
        self._next = 0.0

    @property
    def stops(self) -> str:
        """Why the job stops; empty if it does not."""
        return self._leader.office.stops

    @property
    def wants_checkpoint(self) -> bool:
        """True if a checkpoint was asked for and is not made yet."""
        return self._leader.office.saves

    @property
    def waits(self) -> bool:
        """True while something that was asked for is not done yet."""
        office = self._leader.office
        return bool(office.stops or office.saves or office.told or office.asked is not None)

    def keep(self, **values: Any) -> None:
        """Keep something in the office."""
        self._leader.office = msgspec.structs.replace(self._leader.office, **values)

    def look(self, here: Here) -> None:
        """Read what has come."""
        now, session = self._leader.session.clock(), self._leader.session
        if now < self._next:
            return
        self._next = now + INBOX_EVERY_S
        for name, request in session.run.requests():
            if request is not None and request.kind == "resize" and not self._leader.all_gone():
                continue  # what can be had is known when the leavers' slots are free: it is answered then
            answer = self._answer(here, request)
            with self._leader.reports.log.room():
                session.run.answer(name, answer)
        limit = session.config.time_limit_s
        if limit and session.seconds() >= limit and not self.stops:
            self.keep(stops=f"time_limit_s = {limit:g}")

    def _answer(self, here: Here, request: Request | None) -> Answer:
        kind = request.kind if request is not None else ""
        if request is not None and kind == "resize":
            return self._resize(here, request.ranks)
        if request is not None and kind == "leave":
            self.keep(told=tuple({*self._leader.office.told, request.ranks}))
            return Answer(accepted=True, text=f"process {request.ranks} leaves")
        if kind == "stop":
            self.keep(stops="asked for")
            return Answer(accepted=True, text=f"the job stops at step {here.cursor.step}")
        if kind == "checkpoint":
            self.keep(saves=True)
            return Answer(accepted=True, text=f"a checkpoint is made from step {here.cursor.step} on")
        return Answer(accepted=False, text="the request can't be read")

    def leaving(self) -> Resize | None:
        """Return the resize by which those go that were told to by a signal; if all were told, the job stops."""
        members, now, ids = self._leader.world.generation.members, self._leader.session.clock(), self._leader.office.told
        told = [rank for rank, member in enumerate(members) if member.id in ids] if ids else []
        if not told:
            self._told_since = None
            return None
        if self._told_since is None:
            self._told_since = now
        if now < self._told_since + ALL_TOLD_S:
            return None
        if len(told) == len(members):
            self.keep(stops="all ranks were told to end")
            return None
        names = ", ".join(str(members[rank].id) for rank in told)
        return Resize(len(members) - len(told), tuple(told), f"process {names} was told to end")

    def _resize(self, here: Here, ranks: int) -> Answer:
        leader = self._leader
        if (busy := leader.busy()) is not None:
            return Answer(accepted=False, text=busy)
        config, size = leader.session.config, leader.world.size
        if config.decides != "manual":
            return Answer(
                accepted=False,
                text=f'the job decides by itself (policy = "{config.decides}"): start it with policy = "manual"',
            )
        try:
            check(ranks, leavers=(), now=size, minimum=config.min_ranks, maximum=leader.office.max_ranks)
            supply = leader.poll(here)
            _check_supply(ranks, size + supply.offered, supply.why)
        except ResizeRefused as refusal:
            leader.reports.log.write(events.Refused(step=here.cursor.step, ranks=ranks, reason=str(refusal)))
            return Answer(accepted=False, text=str(refusal))
        leader.asked(ranks)
        return Answer(accepted=True, text=f"{size} -> {ranks} ranks")


def _check_supply(ranks: int, most: int, why: str) -> None:
    if ranks > most:
        raise ResizeRefused(f"{ranks} ranks asked for, but only {most} can be had: {why}")
