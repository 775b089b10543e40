"""What checkpoints in the background cost the steps, and with ``--machinery``, what being ready for losses costs them.

    python -m benchmarks.checkpoints --json [--rounds 5] [--folder DIR]
    python -m benchmarks.checkpoints --json --machinery [--rounds 10]

Both run one job of 2 ranks in which stretches of steps with and without what is measured take turns, and compare them.

Checkpoints: 100 MB of state and a gradient as large, summed by `step.reduce`. A checkpoint comes every 40 steps: the 20 from
there on are a cycle of a job with one every 20 steps, from the snapshot on, and the next 20 are of a job without. A cycle is
compared with the stretches without before and behind it. The first one is left out, since memory is mapped in it.

Machinery: a softmax-like job with steps of some milliseconds and of some tens of them, 10 with all that the runtime does and
10 without the barrier behind each sum and without the looks whether the other ranks live. A round is 10 such pairs. Steps
that begin an epoch are left out: the order of its samples is made there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show
from .running import BrokenError, Running

RANKS = 2
CYCLE = 20  # steps from one checkpoint to the next
STATE_BYTES = 100_000_000
BLOCK, PAIRS, EPOCH = 10, 10, 21  # steps with or without the machinery, as in the job; pairs in a round; steps of an epoch
BATCHES = {"short": 4096, "long": 32768}  # steps of about 5 ms and 50 ms
CHECKPOINT_GOAL, MACHINERY_GOAL = 1.05, 1.01


def ends(running: Running) -> np.ndarray:
    """Return when each step was done on the slower rank, NaN for steps before all ranks were there."""
    there = [rows[rows["size"] == RANKS] for rows in running.rows().values()]
    there = [rows for rows in there if len(rows)]
    if len(there) < RANKS:
        return np.empty(0)
    first, last = max(rows["step"][0] for rows in there), min(rows["step"][-1] for rows in there)
    found = np.full(last + 1, np.nan)
    found[first:] = np.max([rows["time"][(rows["step"] >= first) & (rows["step"] <= last)] for rows in there], axis=0)
    return found


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(mpi: str, rounds: int, folder: Path | None) -> list[Record]:
    """Return what checkpoints cost."""
    # One microbatch a rank: the step is a few hundred milliseconds then.
    settings = [f"microbatches={RANKS}", f"checkpoint_steps={2 * CYCLE}", "checkpoint_s=0"]
    options = ["--ranks", str(RANKS), "--slots", str(RANKS), *(word for each in settings for word in ("--set", each))]
    with Running(options, "checkpoints_job.py", "state", STATE_BYTES, parent=folder) as running:
        running.until(lambda: covered(running) > rounds, f"{rounds + 1} checkpoints", 60.0 * (rounds + 2))
        done, written = ends(running), running.happened(events.Checkpointed)[: rounds + 1]
        running.stop()
    failed = [event.error for event in written if event.error]
    if failed:
        cannot(failed[0])
    ratios, with_s, without_s = [], [], []
    for event in written[1:]:
        # The snapshot is taken between the end of the step before and the begin of this one.
        before, cycle, behind = pairwise(done[event.step - 1 + np.arange(-1, 3) * CYCLE])
        parts = [(end - begin) / CYCLE for begin, end in (before, cycle, behind)]
        with_s.append(parts[1])
        without_s.append((parts[0] + parts[2]) / 2)
        ratios.append(with_s[-1] / without_s[-1])
    written = written[1:]
    busy = [event.seconds / CYCLE / step for event, step in zip(written, with_s, strict=True)]
    if max(busy) > 1:
        print(f"a checkpoint took {max(busy):.1f} times as long as its {CYCLE} steps", file=sys.stderr)
    context: dict[str, Any] = {"mpi": mpi, "ranks": RANKS, "state_bytes": STATE_BYTES}
    more = {
        "checkpoint_steps": CYCLE,
        "step_with_ms": milliseconds(with_s),
        "step_without_ms": milliseconds(without_s),
        "of_cycle_writing": round(statistics.median(busy), 3),
    }
    rates = [event.bytes / event.seconds / 1e6 for event in written]
    return [
        record("checkpoint_step_ratio", ratios, "", {**context, **more}, CHECKPOINT_GOAL),
        record("checkpoint_standstill_ms", [1e3 * event.standstill_s for event in written], "ms", context),
        record("checkpoint_write_s", [event.seconds for event in written], "s", context),
        record("checkpoint_rate", rates, "MB/s", context, better="higher"),
    ]


def covered(running: Running) -> int:
    """Return how many checkpoints there are with all the steps behind them that are needed."""
    last = len(ends(running)) - 1
    return sum(event.step + 2 * CYCLE <= last for event in running.happened(events.Checkpointed))


def milliseconds(seconds: list[float]) -> float:
    """Return the median in milliseconds, for people."""
    return round(1e3 * statistics.median(seconds), 2)


# --- machinery --------------------------------------------------------------------------------------------------------


def machinery(mpi: str, rounds: int) -> Iterator[Record]:
    """Yield what being ready for losses costs, in short steps and in long ones."""
    for name, batch in BATCHES.items():
        options = ["--ranks", str(RANKS), "--slots", str(RANKS)]
        with Running(options, "checkpoints_job.py", "machinery", batch) as running:
            begun = RANKS * BLOCK * PAIRS  # some steps until all is steady
            needed = begun + 2 * BLOCK * PAIRS * rounds
            running.until(lambda now=running, n=needed: np.isfinite(ends(now)[-n:]).sum() >= n, f"{needed} steps", 1200.0)
            done = ends(running)
            running.stop()
        first = int(np.isfinite(done).argmax()) + begun // 2
        first += -first % (2 * BLOCK)  # where a stretch with the machinery begins
        took = np.diff(done)[first - 1 :]  # of step number `first` on
        took[-first % EPOCH :: EPOCH] = np.nan
        pairs = took[: len(took) // (2 * BLOCK) * 2 * BLOCK].reshape(-1, 2, BLOCK)[: rounds * PAIRS]
        each = pairs.reshape(rounds, PAIRS, 2, BLOCK).swapaxes(1, 2).reshape(rounds, 2, -1)
        means, medians = np.nanmean(each, axis=2), np.nanmedian(each, axis=2)
        context = {
            "mpi": mpi,
            "ranks": RANKS,
            "steps": name,
            "step_with_ms": milliseconds(means[:, 0]),
            "step_without_ms": milliseconds(means[:, 1]),
            "ratio_of_medians": round(float(np.median(medians[:, 0] / medians[:, 1])), 4),
        }
        yield record("faults_off_step_ratio", means[:, 0] / means[:, 1], "", context, MACHINERY_GOAL)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--machinery", action="store_true", help="what being ready for losses costs")
    parser.add_argument("--rounds", type=int, help="5 cycles with a checkpoint, 10 rounds of the machinery")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; by default where temporary files do")
    settings = parser.parse_args()
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    try:
        found = (
            list(machinery(mpi, settings.rounds or 10))
            if settings.machinery
            else checkpoints(mpi, settings.rounds or 5, settings.folder)
        )
    except BrokenError as error:
        cannot(str(error))
    show(found, as_json=settings.json)


if __name__ == "__main__":
    main()
