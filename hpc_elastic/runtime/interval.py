"""When the next checkpoint is to begin: early enough that it is on the disk before more than the interval could be lost."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Interval:
    """Says when a checkpoint is due, and learns how long writing one takes.

    What a restart loses at worst are the steps from the snapshot of one checkpoint until the next one is on the disk. So the
    next begins earlier than an interval later, by what writing took the last time; never earlier than half an interval, as a
    job whose writing takes longer could do nothing else. The first one comes at half an interval, since it is not known yet.

    Parameters
    ----------
    steps : int
        Interval in steps; 0 for none.
    seconds : float
        Interval in seconds; 0 for none.
    step : int
        Step of the last snapshot, or where the job began.
    time_s : float
        When that was.
    """

    steps: int
    seconds: float
    step: int
    time_s: float
    _writing: tuple[int, float] | None = None
    _pending: bool = False

    def due(self, step: int, now_s: float) -> bool:
        """Tell whether a checkpoint is due at `step`, at the time `now_s`."""
        self.step = min(self.step, step)  # a new loop counts its steps anew
        writing_steps, writing_s = self._writing or (self.steps, self.seconds)
        return (0 < self.steps <= step - self.step + min(writing_steps, self.steps / 2)) or (
            0 < self.seconds <= now_s - self.time_s + min(writing_s, self.seconds / 2)
        )

    def next_step(self, step: int) -> float:
        """Return the first step from `step` on at which a checkpoint is due by the steps; infinity if none is."""
        writing_steps, _ = self._writing or (self.steps, self.seconds)
        return max(step, math.ceil(self.step + self.steps - min(writing_steps, self.steps / 2))) if self.steps else math.inf

    def began(self, step: int, now_s: float) -> None:
        """Take note of a snapshot."""
        self.step, self.time_s, self._pending = step, now_s, True

    def written(self, step: int, now_s: float) -> None:
        """Take note that what began last is done, as seen at `step`."""
        if self._pending:
            self._pending = False
            # One slow write among quick ones is not forgotten at once. The step under way while it is seen counts as well.
            before_steps, before_s = self._writing or (0, 0.0)
            self._writing = max(step - self.step + 1, before_steps // 2), max(now_s - self.time_s, before_s / 2)
