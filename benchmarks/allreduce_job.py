"""The job that `benchmarks.allreduce` measures: sums of float32, exact and by MPI, in turns.

Usage: python allreduce_job.py FILE RANKS ROUNDS BYTES [BYTES ...]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import hpc_elastic as he
from hpc_elastic.reduce import Sum

FILE, RANKS, ROUNDS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SIZES = [int(word) for word in sys.argv[4:]]


def measure(job: he.Job, nbytes: int) -> dict[str, list[float]]:
    """Return the seconds that each kind of sum took in each round."""
    comm, world = job.comm, job.membership.joined()
    n = nbytes // 4
    x, y = np.random.default_rng(job.rank).random(n, np.float32), np.empty(n, np.float32)
    total = Sum(job.size, job.membership.joined)
    share = n // job.size
    a, b, c = (np.ones(share, np.float32) for _ in range(3))

    def add() -> None:
        total.add(job.rank, x, {}, 1.0)

    kinds: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "exact": (add, lambda: total.exchange(set())),
        "copied": (lambda: None, lambda: (add(), total.exchange(set()))),
        "mpi": (lambda: None, lambda: comm.Allreduce(x, y)),
        "memory": (lambda: None, lambda: np.add(a, b, out=c)),
    }
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    rounds = ROUNDS if nbytes > 1 << 16 else 50 * ROUNDS
    for i in range(rounds + 2):
        for kind, (before, act) in kinds.items():
            before()
            world.board.meet()
            begun = time.perf_counter()
            act()
            ended = time.perf_counter()
            if kind == "memory":
                world.board.meet()
                ended = time.perf_counter()
            if i > 1:
                took[kind].append(ended - begun)
    expected = comm.allreduce(x.astype(np.float64))
    found = total.result()[0]
    assert np.allclose(found, expected, rtol=1e-5)
    return took


def train(job: he.Job) -> None:
    """Measure once all are there."""
    for _ in job.loop(1_000_000):
        if job.size == RANKS:
            found = {nbytes: measure(job, nbytes) for nbytes in SIZES}
            if job.leads:
                FILE.write_text(json.dumps(found))
            break
        time.sleep(0.01)


he.run(train)
