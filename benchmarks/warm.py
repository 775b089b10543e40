"""How soon a newcomer of a TensorFlow job computes, forked by a warm parent and started cold, and how long the others stand.

    python -m benchmarks.warm --json [--job tensorflow] [--cycles 10] [--cold 10]

One job goes 1 -> 2 -> 4 -> 1 and trains on meanwhile, with its warm parent, and in between without: its socket is put away
then, so that guards don't find it. ``newcomer_s`` is the time from the decision until the resize is committed, after
which the newcomers compute. Between two resizes there is the time in which the next ones get ready.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Sequence

import numpy as np

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError
from hpc_elastic.model import Request
from hpc_elastic.rundir import RunDirectory

from .record import Record, cannot, record, show
from .resize import boundary_s, stalls_s
from .running import BrokenError, Running

SIZES = (2, 4, 1)
GROWS = {(1, 2): "1->2", (2, 4): "2->4"}
GOAL_S, GOAL_MS = 1.0, 150.0
APART, APART_S = 20, 4.0  # steps and seconds between two resizes, at least
TURNS = 200_000  # more than enough: the job is stopped in the end
COLD_S = 120.0
LOOK_S = 0.1
HOST = os.uname().nodename


def resize(job: Running, ranks: int) -> None:
    """Have the job go to so many ranks, and on for a while."""
    run, before = RunDirectory(job.path), len(job.happened(events.Resized))
    run.ask(Request("resize", ranks))
    job.until(lambda: len(job.happened(events.Resized)) > before, f"{ranks} ranks", COLD_S)
    since, until = job.happened(events.Resized)[-1].step, time.monotonic() + APART_S
    # The status is late by a quarter of a second, in which leavers end.
    job.until(lambda: job.status().step > since + APART and job.status().ranks == ranks, "steps after it")
    job.until(lambda: time.monotonic() > until, "processes that wait")


def measure(kind: str, cycles: int, cold: int, mpi: str) -> list[Record]:
    """Return the records of one kind of job."""
    options = ["--slots", "4", "--set", "warm=on"]
    with Running(options, "resize_job.py", kind, TURNS, look_s=LOOK_S) as job:
        socket = job.path / "warm" / f"{HOST}.sock"
        job.until(socket.exists, "a warm parent", COLD_S)
        for cycle in range(cycles):
            for ranks in SIZES:
                resize(job, ranks)
            if cycle * cold // cycles < (cycle + 1) * cold // cycles:
                away = socket.rename(socket.with_suffix(".away"))
                for ranks in SIZES:
                    resize(job, ranks)
                away.rename(socket)
        job.stop()
        stamps = {int(file.stem): np.load(file) for file in job.stamps.iterdir()}
        found = job.happened(events.Resized)
        ready = job.happened(events.Ready)
    ways = ("warm", "cold") if cold else ("warm",)
    return [each for how in ways for each in records(kind, mpi, how, found, ready, stamps)]


def records(
    kind: str,
    mpi: str,
    how: str,
    resizes: Sequence[events.Resized],
    ready: list[events.Ready],
    stamps: dict[int, np.ndarray],
) -> list[Record]:
    """Return the records of those `resizes` whose newcomers all came `how`."""
    ways = {event.member: event.how.partition(":")[0] for event in ready}
    found = []
    for sizes, name in GROWS.items():
        these = [
            change
            for change in resizes
            if (change.before, change.after) == sizes and all(ways[member] == how for member in change.joined)
        ]
        if not these:
            cannot(f"no newcomer of {name} came {how}")
        own = [event.stages for event in ready if any(event.member in change.joined for change in these)]
        stages = {stage: round(statistics.median(each[stage] for each in own), 3) for stage in ("start", "warm", "spawn")}
        context = {"job": kind, "change": name, "mpi": mpi, "start": how}
        took = [change.wait_s + change.standstill_s for change in these]
        still = [1e3 * (boundary_s(change, stamps) + stalls_s(change, ready, stamps)) for change in these]
        goal_s, goal_ms = (GOAL_S, GOAL_MS) if how == "warm" else (None, None)
        found.append(record("newcomer_s", took, "s", {**context, "stages_s": stages}, goal_s))
        found.append(record("standstill_ms", still, "ms", context, goal_ms))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", choices=["tensorflow", "cnn"], action="append")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--cold", type=int, default=10, help="cycles without the warm parent, as many as the others at most")
    settings = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        cannot("TensorFlow is not installed")
    try:
        mpi = find_mpiexec()[1].key
        for kind in settings.job or ["tensorflow", "cnn"]:
            show(measure(kind, settings.cycles, settings.cold, mpi), as_json=settings.json)
    except (LaunchError, BrokenError) as error:
        cannot(str(error))


if __name__ == "__main__":
    main()
