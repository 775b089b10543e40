"""The job that `benchmarks.gpu` measures: sums of float32 arrays on GPUs, in several ways, in turns.

Usage: python gpu_job.py FILE RANKS ROUNDS BYTES [BYTES ...]
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

FILE, RANKS, ROUNDS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SIZES = [int(word) for word in sys.argv[4:]]
WARM = 3


def measure(job: he.Job, nbytes: int) -> dict[str, list[float]]:
    """Return the seconds that each kind of sum took on the slowest rank, in each round."""
    import cupy

    x = cupy.random.default_rng(job.rank).random(nbytes // 4, np.float32)
    y, near = cupy.empty_like(x), np.empty(x.shape, np.float32)

    def by_hand() -> None:
        x.get(out=near)
        y.set(he.allreduce(near, near))

    kinds: dict[str, Callable[[], object]] = {
        "exact": lambda: he.allreduce(x, y),
        "library": lambda: he.allreduce(x, y, exact=False),
        "by hand": by_hand,
    }
    world, stream = job.membership.joined(), cupy.cuda.get_current_stream()
    took = np.empty((len(kinds), WARM + ROUNDS))
    for turn in range(WARM + ROUNDS):
        for kind, act in enumerate(kinds.values()):
            stream.synchronize()
            world.barrier()
            begun = time.perf_counter()
            act()
            stream.synchronize()
            took[kind, turn] = time.perf_counter() - begun
    job.comm.Allreduce(MPI.IN_PLACE, took, MPI.MAX)
    return {kind: took[number, WARM:].tolist() for number, kind in enumerate(kinds)}


def train(job: he.Job) -> None:
    """Measure once all are there."""
    job.gpu()
    for _ in job.loop(1_000_000):
        if job.size == RANKS:
            found = {nbytes: measure(job, nbytes) for nbytes in SIZES}
            line = type(job.membership.joined().keep("nccl", object)).__name__ == "Line"
            if job.leads:
                part = FILE.with_suffix(".part")
                part.write_text(json.dumps({"way": "nccl" if line else "staged", "seconds": found}))
                part.replace(FILE)
            break
        time.sleep(0.01)  # what it waits for are other processes


he.run(train)
