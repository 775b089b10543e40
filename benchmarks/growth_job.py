"""The job that `benchmarks.growth` measures: after each resize, sums and broadcasts in turns; between them it does little.

Usage: python growth_job.py ROUNDS FOLDER BYTES
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mpi4py import MPI

import hpc_elastic as he

ROUNDS, FOLDER, BYTES = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
TURNS = 1_000_000  # it is stopped
WARM = 2
TURN_S = 0.005


def measure(job: he.Job) -> dict[str, list[float]]:
    """Return the seconds that each took on the slowest rank, in each round."""
    world = job.membership.joined()
    x, y = np.full(BYTES // 4, job.rank + 1, np.float32), np.empty(BYTES // 4, np.float32)
    kinds: dict[str, Callable[[], object]] = {"sum": lambda: he.allreduce(x, y), "broadcast": lambda: he.broadcast(y)}
    took = np.empty((len(kinds), WARM + ROUNDS))
    for turn in range(WARM + ROUNDS):
        for kind, act in enumerate(kinds.values()):
            world.barrier()
            begun = time.perf_counter()
            act()
            took[kind, turn] = time.perf_counter() - begun
    assert (y == job.size * (job.size + 1) / 2).all()
    job.comm.Allreduce(MPI.IN_PLACE, took, MPI.MAX)
    return {kind: took[number, WARM:].tolist() for number, kind in enumerate(kinds)}


def train(job: he.Job) -> None:
    """Measure at each size, once all who are to come are there."""
    job.register(state=np.zeros(BYTES // 4, np.float32))
    seen, number = job.generation.number if job.joined else -1, 0
    for _ in job.loop(TURNS):
        if job.generation.number != seen:
            seen, number = job.generation.number, number + 1
            found = {"ranks": job.size, "seconds": measure(job)} if job.size > 1 else None
            if job.leads and found is not None:
                part = FOLDER / f"{number}.part"
                part.write_text(json.dumps(found))
                part.replace(FOLDER / f"{number}.json")
        time.sleep(TURN_S)  # a step of little work, which leaves the cores to those that start


if __name__ == "__main__":
    he.run(train)
