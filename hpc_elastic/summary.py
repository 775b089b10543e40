"""What happened in a run, as values: attempts, generations and what each cost, losses, checkpoints, the failure."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import msgspec

from . import events
from .standing import LIVE, look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .rundir import Failure, RunDirectory, Status

FIRST_LOOP = 1  # as the job numbers them


def summarize(run: RunDirectory) -> dict[str, Any]:
    """Return what happened in `run` so far, as values that JSON can express.

    Times are in seconds, sizes in bytes. What is not known, or not known yet, is None. Steps and epochs that were lost and
    done once more count once, but in each generation that did them.

    Raises
    ------
    RunDirectoryError
        If a file of the run is damaged.
    """
    happened = events.read(run.events)
    status, failure = look(run)
    starts = [event for event in happened if isinstance(event, events.Started)]
    started = starts[0] if starts else None
    ended = _end(happened)
    history = _History(happened, status)
    epochs, generations = history.epochs, history.generations()
    summary: dict[str, Any] = {
        "run": str(run.path),
        "script": started.script if started else None,
        "mpi": " ".join(starts[-1].mpi.split()) if started else None,
        "settings": starts[-1].settings if started else {},
        "hosts": _hosts(happened),
        "state": "failed" if failure else status.state if status else "starting",
        "started": started.time if started else None,
        "seconds": ended.seconds if ended and len(starts) == 1 else _seconds(started, happened, status, failure),
        "attempts": len(starts),
        "ranks": ended.ranks if ended else status.ranks if status else generations[-1]["ranks"] if generations else None,
        "steps": history.steps,
        "steps_lost": sum(generation["steps"] for generation in generations) - history.steps,
        "steps_planned": status.steps if status else None,
        "epochs": len(epochs),
        "unit": _unit(epochs, status),
        "metrics": dict(status.metrics if status and status.metrics else epochs[-1].metrics if epochs else {}),
        "under_way": status.under_way if status and status.state in LIVE and not failure else "",
        "generations": generations,
        "newcomers": _told(happened, events.Ready),
        "losses": _told(happened, events.Lost),
        "restarts": _told(happened, events.Restarted),
        "resumes": _told(happened, events.Resumed),
        "rewinds": _told(happened, events.Rewound),
        "checkpoints": _checkpoints(happened),
        "refusals": _told(happened, events.Refused),
        "notices": _told(happened, events.Notice),
        "processes": [
            {**msgspec.to_builtins(record.member), "outcome": record.outcome, "peak_bytes": record.peak_bytes}
            for record in run.records()
        ],
        "failure": msgspec.to_builtins(failure) if failure else None,
    }
    return summary


def _told(happened: Sequence[events.AnyEvent], kind: type[events.Event]) -> list[dict[str, Any]]:
    found = [msgspec.structs.asdict(event) for event in happened if isinstance(event, kind)]
    return [{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()} for values in found]


def _end(happened: Sequence[events.AnyEvent]) -> events.Ended | None:
    """Return how the last attempt ended, if it did."""
    for event in reversed(happened):
        if isinstance(event, events.Ended):
            return event
        if isinstance(event, events.Started):
            break
    return None


def _hosts(happened: Sequence[events.AnyEvent]) -> list[str]:
    seeds = [host for event in happened if isinstance(event, events.Started) for host in event.hosts]
    return list(dict.fromkeys([*seeds, *(event.host for event in happened if isinstance(event, events.Ready))]))


def _seconds(
    started: events.Started | None, happened: Sequence[events.AnyEvent], status: Status | None, failure: Failure | None
) -> float | None:
    if started is None:
        return None
    if failure is None and status is not None and status.state == "running":
        return time.time() - started.time
    ends = [event.time for event in happened] + ([failure.time] if failure else [])
    return max(ends) - started.time


def _unit(epochs: Sequence[events.Epoch], status: Status | None) -> str:
    if status is not None and status.unit != "samples":
        return status.unit
    # A job without a data set counts one a turn.
    return "turns" if epochs and epochs[-1].samples == epochs[-1].step + 1 else "samples"


def _checkpoints(happened: Sequence[events.AnyEvent]) -> dict[str, Any]:
    tried = [event for event in happened if isinstance(event, events.Checkpointed)]
    good = [event for event in tried if not event.error]
    return {
        "count": len(good),
        "seconds": statistics.median(event.seconds for event in good) if good else None,
        "standstill_s": statistics.median(event.standstill_s for event in good) if good else None,
        "last": msgspec.structs.asdict(good[-1]) if good else None,
        "errors": [{"time": event.time, "step": event.step, "error": event.error} for event in tried if event.error],
    }


class _History:
    """Goes through the events: one row for each generation, and the steps and epochs that count.

    Attributes
    ----------
    epochs : list of Epoch
        The ends of epochs.
    """

    def __init__(self, happened: Sequence[events.AnyEvent], status: Status | None) -> None:
        self._rows: list[dict[str, Any]] = []
        self._holds = False
        self._attempt = 0
        self._loop = FIRST_LOOP
        self._done: dict[int, int] = {}  # steps by loop
        self._epochs: list[tuple[int, events.Epoch]] = []
        self._before = self._done, self._epochs  # the same, of the attempts before
        for event in happened:
            if isinstance(event, events.Started):
                self._start(event)
            elif self._rows:
                self._follow(event)
        # While it says "starting", its step is that of the attempt before.
        if self._rows and status is not None and status.state == "running" and status.time > self._rows[-1]["end"]:
            self._reach(max(status.step, self._rows[-1]["to_step"]), status.time)

    @property
    def steps(self) -> int:
        """Steps done, over all loops."""
        return sum(self._done.values())

    @property
    def epochs(self) -> list[events.Epoch]:
        return [event for _, event in self._epochs]

    def generations(self) -> list[dict[str, Any]]:
        """Return how each generation came to be, what that cost, and what was done in it."""
        batch = next((row["batch"] for row in reversed(self._rows) if row["batch"]), None)
        return [_finished(row, batch) for row in self._rows]

    def _start(self, event: events.Started) -> None:
        self._attempt += 1
        self._holds = bool(event.settings.get("hold"))
        if self._done:
            self._before = self._done, self._epochs
        self._done, self._epochs, self._loop = {}, [], FIRST_LOOP
        self._row(0, 0, event.ranks, event.time, joined=list(range(event.ranks)), reason="start")

    def _follow(self, event: events.AnyEvent) -> None:
        row = self._rows[-1]
        if isinstance(event, events.Resumed):
            self._return_to(event.loop, event.step)
            row.update(from_step=event.step, to_step=event.step, reason=f"checkpoint of step {event.step}")
        elif isinstance(event, events.Rewound):
            self._before = self._done, self._epochs  # what this attempt did counts as well, up to there
            self._return_to(event.loop, event.step)
            row.update(from_step=event.step, to_step=event.step)
        elif isinstance(event, events.Resized):
            # With hold the members did not step on while the newcomers got ready.
            idle_s = event.standstill_s + (event.wait_s if self._holds else 0.0)
            self._reach(event.step, event.time - idle_s)
            self._resized(event)
        elif isinstance(event, events.Lost):
            self._reach(event.step, event.time - event.recovery_s)
            self._row(event.generation, event.step, event.after, event.time, left=list(event.members), reason=event.how)
        elif isinstance(event, events.Epoch):
            self._epoch(event)
        elif isinstance(event, events.Ended):
            self._reach(event.steps, event.time)
        elif isinstance(event, events.Failed) and event.step >= row["to_step"]:
            self._reach(event.step, event.time)
        elif isinstance(event, events.Restarted) and event.step > row["to_step"]:
            # How far the attempt came, as far as is known.
            self._reach(event.step, event.time)

    def _row(self, number: int, step: int, ranks: int, when: float, **values: Any) -> None:
        place = {"attempt": self._attempt, "number": number, "ranks": ranks, "from_step": step, "to_step": step, "steps": 0}
        cost = {"standstill_s": 0.0, "stages": {}, "wait_s": 0.0, "state_bytes": 0, "moved_bytes": 0}
        how = {"joined": [], "left": [], "reason": ""}
        self._rows.append({**place, **how, **cost, **values, "begin": when, "end": when, "batch": None})

    def _resized(self, event: events.Resized) -> None:
        self._row(
            event.generation,
            event.step,
            event.after,
            event.time,
            joined=list(event.joined),
            left=list(event.left),
            reason=event.reason,
            standstill_s=event.standstill_s,
            stages=event.stages,
            wait_s=event.wait_s,
            state_bytes=event.state_bytes,
            moved_bytes=event.moved_bytes,
        )

    def _epoch(self, event: events.Epoch) -> None:
        row = self._rows[-1]
        if not row["steps"]:  # the first epoch began when the script was ready to train, which is what counts
            row["begin"] = max(row["begin"], event.time - event.seconds)
        self._reach(event.step + 1, event.time)
        # Samples of a step: all epochs are alike.
        row["batch"] = event.samples * (event.epoch + 1) / (event.step + 1)
        self._epochs.append((self._loop, event))

    def _return_to(self, loop: int, step: int) -> None:
        """Go on from a checkpoint: of what was done before this attempt, that counts which came before the checkpoint."""
        done, epochs = self._before
        self._loop = loop
        self._done = {**{number: steps for number, steps in done.items() if number < loop}, loop: step}
        self._epochs = [(number, event) for number, event in epochs if (number, event.step) < (loop, step)]

    def _reach(self, step: int, when: float) -> None:
        """Note that `step` steps were done at time `when`; a second loop of the script counts from 0 again."""
        row = self._rows[-1]
        if step < row["to_step"]:
            self._loop += 1
            new = step
        else:
            new = step - row["to_step"]
        row["to_step"] = self._done[self._loop] = step
        if new:  # what follows the last step is no part of its pace
            row["steps"] += new
            row["end"] = when


def _finished(row: dict[str, Any], batch: float | None) -> dict[str, Any]:
    begin, end = row["begin"], row["end"]
    per_step = row["batch"] or batch
    rate = row["steps"] / (end - begin) if row["steps"] and end > begin else None
    samples = rate * per_step if rate is not None and per_step else None
    rest = {name: value for name, value in row.items() if name not in ("begin", "end", "batch")}
    return {**rest, "seconds": end - begin, "steps_per_s": rate, "samples_per_s": samples}
