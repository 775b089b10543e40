"""What a run shows when it is over: its events, its ledger, what became of a trouble, what it left lying about."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from hpc_elastic import events
from hpc_elastic.runtime.agreement import Verdict

T = TypeVar("T", bound=events.Event)

AS_EVER, WENT_ON, DROPPED, ROLLED_BACK = "as ever", "went on", "newcomer dropped", "rolled back"
BEGAN_AGAIN, RESTARTED = "began again", "restarted"
OUTCOMES = (AS_EVER, WENT_ON, DROPPED, ROLLED_BACK, BEGAN_AGAIN, RESTARTED)


def happened(run: Path, kind: type[T]) -> list[T]:
    """Return the events of a `kind` in the run directory `run`."""
    return [event for event in events.read(run / "events.jsonl") if isinstance(event, kind)]


def resizes(run: Path) -> list[events.Resized]:
    """Return the resizes of a run."""
    return happened(run, events.Resized)


def refusals(run: Path) -> list[str]:
    """Return the reasons of a run's refusals."""
    return [event.reason for event in happened(run, events.Refused)]


def verdicts(run: Path) -> list[Verdict]:
    """Return what survivors agreed on, in all attempts."""
    return [msgspec.json.decode(path.read_bytes(), type=Verdict) for path in run.rglob("losses/*/verdict.json")]


def outcome(run: Path) -> str:
    """Return how a run that ended well came through its troubles: of several ways, the hardest."""
    if happened(run, events.Restarted):
        return RESTARTED
    if happened(run, events.Rewound):
        return BEGAN_AGAIN
    if any(verdict.dismissed for verdict in verdicts(run)):
        return ROLLED_BACK
    if any("newcomer" in reason for reason in refusals(run)):
        return DROPPED
    return WENT_ON if happened(run, events.Lost) else AS_EVER


def check_ledger(run: Path, epochs: int, samples: int) -> None:
    """Check that every sample stands exactly once per epoch in the run's ledger.

    Of a step that was done more than once, since a rank was lost in it or the job was restarted, the last attempt counts.
    """
    files = [np.fromfile(file, np.int64).reshape(-1, 4) for file in (run / "ledger").iterdir()]
    epoch, step, attempt, sample = np.concatenate(files).T
    last = np.full(step.max() + 1, -1)
    np.maximum.at(last, step, attempt)
    counts = attempt == last[step]
    for number in range(epochs):
        np.testing.assert_array_equal(np.sort(sample[counts & (epoch == number)]), np.arange(samples))
    assert counts.sum() == epochs * samples


def unfinished(run: Path) -> list[Path]:
    """Return what should not be left of a run that has ended: sockets, files half written, unfinished checkpoints."""
    found = [path for path in run.rglob("*") if path.is_socket() or path.name.startswith(".")]
    return [path for path in found if path.parent not in found]
