"""One loop of a job: where it stands, and what happens at its turns."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from ..errors import JobError, Retired
from ..model import Cursor
from .agreement import CHECKPOINT, COPY, END, RESIZE, STOP
from .plan import Sums, Tally
from .reports import Here
from .saving import LEAVERS_WAIT_S

if TYPE_CHECKING:
    from .membership import Membership
    from .saving import Saving


class Loop:
    """A loop over steps or turns, as this rank goes through it.

    Attributes
    ----------
    here : Here
        Where it stands.
    stopped : bool
        True once the job was asked to stop.
    """

    def __init__(self, membership: Membership, saving: Saving, here: Here) -> None:
        self.here = here
        self.stopped = False
        self._membership = membership
        self._saving = saving

    def begin(self) -> bool:
        """Come in: from the start, from a checkpoint, or as a newcomer. False if the job is past this loop."""
        if self._membership.world is None:
            return self._join()
        restored = self._saving.restore(self.here)
        if restored is None:
            return False
        self.here = restored
        return self.going()

    def _join(self) -> bool:
        while True:
            call, plan = self._membership.join(self.here)
            if plan is not None:
                self.here = msgspec.structs.replace(self.here, cursor=plan.cursor, tally=plan.tally)
                return True
            if call == "skip":
                return False
            if not self._membership.member.parks:
                raise Retired("sent away before joining")
            self._membership.leave(self.here)  # the resize was given up: back to sleep

    def going(self) -> bool:
        """Pass the resize point of the next turn; False if there is none: the loop is at its end, or the job stops."""
        cursor = self.here.cursor
        if cursor.step >= self.here.steps or cursor.epoch >= self.here.epochs or self.stopped:
            return False
        word = self._membership.pass_point(self.here)
        world = self._membership.world
        if world is None or world.size == 1:
            self._saving.copies.drop()  # what is kept would be old when there are others again
        if word == END:
            raise JobError(f"rank 0 left the loop at step {self.here.cursor.step}, and this rank did not: all have to")
        if word == RESIZE and self._membership.world is None:
            self._saving.finish(LEAVERS_WAIT_S)
            self._membership.leave(self.here)
            return self._join()
        if word in (STOP, CHECKPOINT):
            self._saving.save(self.here)
        elif word == COPY:
            self._saving.copy(self.here)
        self.stopped = word == STOP
        return not self.stopped

    def advance(self, cursor: Cursor, samples: int, metrics: dict[str, float], *, end_of_epoch: bool) -> None:
        """Go on to `cursor`, after `samples` more."""
        here, leader = self.here, self._membership.leader
        tally = here.tally.plus(samples, metrics)
        recent = tally.recent
        if here.tells(cursor.step):
            if leader is not None and recent.sums:
                leader.reports.measured(here, cursor.step, leader.world.size, recent.means(), recent.samples)
            tally = msgspec.structs.replace(tally, recent=Sums())
        if end_of_epoch and leader is not None:
            leader.reports.epoch(msgspec.structs.replace(here, tally=tally), leader.world.size)
        if end_of_epoch and cursor.step < here.steps:
            tally = Tally(began=time.time(), recent=tally.recent)
        self.here = msgspec.structs.replace(here, cursor=cursor, tally=tally)
