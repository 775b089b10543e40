"""When the leader has the state kept: in checkpoints, and in copies in the ranks' memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from .interval import Interval
from .recovery import needs_all

if TYPE_CHECKING:
    from .leader import Leader
    from .reports import Here


class Keeping:
    """Says when, for a leader, and tells what became of it.

    Attributes
    ----------
    waits : bool
        True as long as one that is being written was not told of.
    """

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._interval: Interval | None = None
        self.waits = False
        self._copied, self._next_copy_s = (0, -1), 0.0  # loop and generation of the last copy; when the next one comes

    def due(self, here: Here) -> str:
        """Return what is to be made at this turn: "checkpoint", "copy", or nothing."""
        if self._leader.saving is None:
            return ""
        if self._checkpoint_due(here):
            return "checkpoint"
        return "copy" if self._copy_due(here) else ""

    def next_step(self, step: int) -> float:
        """Return the first step from `step` on at which a checkpoint is due by the steps; infinity if none is."""
        return self._interval.next_step(step) if self._interval is not None else step

    def _checkpoint_due(self, here: Here) -> bool:
        """Tell whether a checkpoint is to be made now; one that is still being written has to be done first."""
        leader, now, step = self._leader, time.time(), here.cursor.step
        if self._interval is None:
            config, office = leader.session.config, leader.office
            begun = (office.saved_step, office.saved_s) if office.saved_s else (step, now)  # by the leader before
            self._interval = Interval(config.checkpoint_steps, config.checkpoint_s, *begun)
        self.waits = leader.saving is not None and leader.saving.busy
        if self.report(here):
            self._interval.written(step, now)
        asked, busy = leader.inbox.wants_checkpoint, leader.saving is not None and leader.saving.busy
        if busy or not (asked or self._interval.due(step, now)):
            return False
        self._interval.began(step, now)
        leader.office = msgspec.structs.replace(leader.office, saved_step=step, saved_s=now, saves=False)
        return True

    def _copy_due(self, here: Here) -> bool:
        """Tell whether copies are due of what a lost rank would take with it: after each resize, and now and then."""
        leader = self._leader
        config, now, number = leader.session.config, leader.session.clock(), leader.world.generation.number
        if config.recovery != "memory" or leader.world.size == 1 or not needs_all(here):
            return False
        if self._copied == (here.loop, number) and now < self._next_copy_s:
            return False
        self._copied, self._next_copy_s = (here.loop, number), now + config.copy_s
        return True

    def report(self, here: Here) -> bool:
        """Tell of the checkpoints that are done, or have failed, and return whether there were any."""
        leader = self._leader
        outcomes = leader.saving.outcomes() if leader.saving is not None else []
        for outcome in outcomes:
            leader.reports.log.write(outcome)
            if outcome.error:
                leader.say(here, f"the checkpoint of step {outcome.step} failed, the job goes on: {outcome.error}")
        return bool(outcomes)
