"""How long the training ranks stand still at a resize, and how long a newcomer takes: 1 -> 2 -> 4 -> 2 -> 1, repeated.

    python -m benchmarks.resize --json [--cycles 10]

A rank stands still at the boundary between two steps (merge, sync, split and so on), and within a step when the spawn of a
newcomer holds the MPI's lock. Both are read off stamps that the job's own loop writes, on every rank; the slowest rank
counts. The stages are the runtime's own, from the run's events.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show

SIZES = (2, 4, 2, 1)
CHANGES = {(1, 2): "1->2", (2, 4): "2->4", (4, 2): "4->2", (2, 1): "2->1"}
GOALS_MS = {"2->4": 150.0, "4->2": 50.0, "2->1": 50.0}
APART = 60  # steps between two resizes, at least
AROUND_S = 0.05  # between the events and the stamps
STALL_S = 0.02  # a step that takes this much longer than the median was held up, not merely slow


def run(cycles: int, folder: Path) -> tuple[list[events.Resized], list[events.Ready], dict[int, np.ndarray]]:
    """Run the job through `cycles` cycles; return the resizes, the newcomers' reports, and the stamps by member."""
    entries = [f"{APART * (i + 1)}:{SIZES[i % len(SIZES)]}" for i in range(cycles * len(SIZES))]
    stamps = folder / "stamps"
    stamps.mkdir()
    turns = 200_000  # more than enough: the job is stopped after the last resize
    script = str(Path(__file__).parent / "resize_job.py")
    options = ["--run-dir", str(folder / "run"), "--slots", "4", "--timetable", ",".join(entries)]
    command = [sys.executable, "-m", "hpc_elastic.cli", "run", *options, script, "numpy", str(stamps), str(turns)]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                if len(_resizes(folder)) == len(entries):
                    stop = [sys.executable, "-m", "hpc_elastic.cli", "stop", str(folder / "run"), "--wait"]
                    subprocess.run(stop, check=False, stdout=sys.stderr, stderr=sys.stderr)
    if process.returncode != 0:
        cannot(f"the job ended with exit code {process.returncode}")
    ready = [event for event in events.read(folder / "run" / "events.jsonl") if isinstance(event, events.Ready)]
    return _resizes(folder), ready, {int(file.stem): np.load(file) for file in stamps.iterdir()}


def _resizes(folder: Path) -> list[events.Resized]:
    return [event for event in events.read(folder / "run" / "events.jsonl") if isinstance(event, events.Resized)]


def boundary_s(change: events.Resized, stamps: dict[int, np.ndarray]) -> float:
    """Return how long the slowest rank stood still between the steps before and after `change`."""
    gaps = []
    for rows in stamps.values():
        before, after = rows[rows[:, 0] == change.step - 1], rows[rows[:, 0] == change.step]
        if len(before) and len(after):
            gaps.append(after[0, 1] - before[0, 2])
    return max(gaps)


def stalls_s(change: events.Resized, ready: list[events.Ready], stamps: dict[int, np.ndarray]) -> float:
    """Return how long the slowest rank was held up within steps while the newcomers of `change` were being connected.

    Before, while they warm up, a step may be slower because it has to share the cores with them, but nobody stands still.
    """
    commit = change.time - change.standstill_s
    begin = commit - sum(event.stages["spawn"] for event in ready if event.member in change.joined) - AROUND_S
    found = [0.0]
    for rows in stamps.values():
        before = rows[(rows[:, 1] > commit - change.wait_s - AROUND_S) & (rows[:, 0] < change.step)]
        if len(before) < 3:
            continue
        took = np.diff(before[:, 2])
        over = took - np.median(took)
        connecting = before[1:, 2] > begin
        found.append(float(over[connecting & (over > STALL_S)].sum()))
    return max(found)


def measure(cycles: int, mpi: str) -> list[Record]:
    """Return the records."""
    with tempfile.TemporaryDirectory() as folder:
        resizes, ready, stamps = run(cycles, Path(folder))
    found = []
    for sizes, name in CHANGES.items():
        these = [change for change in resizes if (change.before, change.after) == sizes]
        grows = sizes[1] > sizes[0]
        held_ms = [1e3 * stalls_s(change, ready, stamps) if grows else 0.0 for change in these]
        total_ms = [1e3 * boundary_s(change, stamps) + held for change, held in zip(these, held_ms, strict=True)]
        stages = {
            stage: round(1e3 * statistics.median(c.stages.get(stage, 0.0) for c in these), 2) for stage in these[0].stages
        }
        if grows:
            stages = {"spawn": round(statistics.median(held_ms), 2), **stages}
        context = {
            "job": "numpy",
            "change": name,
            "mpi": mpi,
            "state_bytes": max(c.state_bytes for c in these),
            "stages_ms": stages,
        }
        found.append(record("standstill_ms", total_ms, "ms", context, GOALS_MS.get(name)))
        if grows:
            wait = [change.wait_s + change.standstill_s for change in these]
            found.append(record("newcomer_s", wait, "s", {"job": "numpy", "change": name, "mpi": mpi}))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cycles", type=int, default=10)
    settings = parser.parse_args()
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    show(measure(settings.cycles, mpi), as_json=settings.json)


if __name__ == "__main__":
    main()
