"""The course of a run: what was measured at which step, how many ranks there were when, and what happened to them.

Steps are counted over all loops of the script. What was lost is taken back, so that of each step the last account counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from . import events
from .model import numbers

FIRST_LOOP = 1  # as the job numbers them


class Value(msgspec.Struct, frozen=True):
    """Metrics when `step` steps are done; ``epoch`` is the number of the epoch that they are the means over, if any."""

    time: float
    step: int
    metrics: dict[str, float]
    epoch: int | None = None


class Back(msgspec.Struct, frozen=True):
    """The steps after `step` were lost: what was said of them before does not count any more."""

    time: float
    step: int


class Change(msgspec.Struct, frozen=True):
    """From here on there are `ranks` ranks. ``what`` is start, expand, shrink, loss, rewind, restart, failure or end.

    After the last three there are none. For `standstill_s` seconds before `time` the ranks stood still.
    """

    time: float
    step: int
    ranks: int
    what: str
    standstill_s: float = 0.0


Entry = Value | Back | Change


class Course:
    """Follows the events of a run, one after the other, as they are written."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}  # steps done by loop
        self._loop = FIRST_LOOP
        self._said = 0  # the last step that something was said of
        self._returns = False  # an attempt has begun, and its first event tells where
        self._began = False

    def follow(self, event: events.AnyEvent) -> Iterator[Entry]:
        """Yield what `event` means: nothing, or one entry or more."""
        if isinstance(event, events.Started):
            self._returns, self._began = self._began, True
            if not self._returns:
                yield self._change(event.time, event.ranks, "start")
        elif isinstance(event, events.Resumed):
            yield from self._return_to(event, event.ranks)
        elif isinstance(event, events.Restarted):
            yield self._change(event.time, 0, "restart")
        elif isinstance(event, events.Failed | events.Ended):
            yield self._change(event.time, 0, "failure" if isinstance(event, events.Failed) else "end")
        elif isinstance(event, events.Rewound):
            yield from self._rewind(event)
        elif isinstance(event, events.Measured | events.Epoch):
            yield from self._return_to_the_start(event.time, event.ranks)
            yield self._value(event)
        elif isinstance(event, events.Resized | events.Lost):
            yield from self._return_to_the_start(event.time, event.before)
            yield from self._resize(event)

    def _value(self, event: events.Measured | events.Epoch) -> Value:
        metrics = numbers(event.metrics)
        if isinstance(event, events.Measured):
            return Value(event.time, self._reach(event.step, event.loop), metrics)
        return Value(event.time, self._reach(event.step + 1), metrics, event.epoch)

    def _resize(self, event: events.Resized | events.Lost) -> Iterator[Entry]:
        if isinstance(event, events.Resized):
            what = "expand" if event.after >= event.before else "shrink"
            stood_s = event.standstill_s
        else:
            what, stood_s = "loss", event.recovery_s
            if self._offset() + event.step < self._said:  # the lost leader had told of the step that is done again
                yield self._back(event.time, event.step)
        self._reach(event.step)
        yield self._change(event.time, event.after, what, stood_s)

    def _rewind(self, event: events.Rewound) -> Iterator[Entry]:
        self._loop = event.loop
        yield self._back(event.time, event.step)
        yield self._change(event.time, event.ranks, "rewind", event.seconds)

    def _return_to(self, event: events.Resumed, ranks: int) -> Iterator[Entry]:
        self._returns, self._loop = False, event.loop
        yield self._back(event.time, event.step)
        yield self._change(event.time, ranks, "start")

    def _return_to_the_start(self, when: float, ranks: int) -> Iterator[Entry]:
        if self._returns:
            self._returns, self._loop = False, FIRST_LOOP
            yield self._back(when, 0)
            yield self._change(when, ranks, "start")

    def _back(self, when: float, step: int) -> Back:
        self._lengths = {loop: steps for loop, steps in self._lengths.items() if loop < self._loop}
        self._lengths[self._loop] = step
        self._said = self._offset() + step
        return Back(when, self._said)

    def _change(self, when: float, ranks: int, what: str, stood_s: float = 0.0) -> Change:
        return Change(when, self._said, ranks, what, stood_s)

    def _offset(self) -> int:
        return sum(steps for loop, steps in self._lengths.items() if loop < self._loop)

    def _reach(self, step: int, loop: int | None = None) -> int:
        """Note that `step` steps of a loop were done; return how many that are over all loops."""
        if loop is None:  # a loop that begins counts from 0 again
            loop = self._loop + (step < self._lengths.get(self._loop, 0))
        self._loop = loop
        self._lengths[loop] = max(step, self._lengths.get(loop, 0))
        self._said = self._offset() + step
        return self._said


def whole(happened: Iterable[events.AnyEvent]) -> list[Value | Change]:
    """Return the course of a whole run, without what was lost: values by step, changes as they came."""
    course = Course()
    found: list[Value | Change] = []
    for event in happened:
        for entry in course.follow(event):
            if isinstance(entry, Back):
                found = [each for each in found if isinstance(each, Change) or each.step <= entry.step]
            else:
                found.append(entry)
    return found
