"""The job that `benchmarks.allreduce` measures: sums of float32, exact and by others, in turns.

Usage: python allreduce_job.py FILE RANKS ROUNDS BYTES [BYTES ...]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mpi4py import MPI

import hpc_elastic as he
from hpc_elastic.reduce import Sum

FILE, RANKS, ROUNDS = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SIZES = [int(word) for word in sys.argv[4:]]
SMALL_BYTES, MORE = 1 << 21, 20  # for what is so small, so many times as many rounds
WARM = 3


@contextmanager
def gloo(job: he.Job) -> Iterator[Callable[[np.ndarray], Callable[[], object]] | None]:
    """Give what makes a sum of torch's, if it is installed."""
    try:
        import torch
        from torch import distributed
    except ImportError:
        yield None
        return
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{FILE}.gloo", job.size)
    distributed.init_process_group("gloo", store=store, rank=job.rank, world_size=job.size)

    def of(array: np.ndarray) -> Callable[[], object]:
        tensor = torch.from_numpy(array)
        return lambda: distributed.all_reduce(tensor)

    yield of
    distributed.destroy_process_group()


def measure(
    job: he.Job, nbytes: int, by_gloo: Callable[[np.ndarray], Callable[[], object]] | None
) -> dict[str, list[float]]:
    """Return the seconds that each kind of sum took on the slowest rank, in each round."""
    comm, world = job.comm, job.membership.joined()
    n = nbytes // 4
    x, y, z = np.random.default_rng(job.rank).random(n, np.float32), np.empty(n, np.float32), np.zeros(n, np.float32)
    total = Sum(job.size, job.membership.joined)
    a, b, c = (np.ones(n // job.size, np.float32) for _ in range(3))

    def add() -> None:
        total.add(job.rank, x, {}, 1.0)

    def copied() -> None:
        add()
        total.exchange(set())

    def nothing() -> None:
        pass

    kinds: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "in place": (add, lambda: total.exchange(set())),
        "copied": (nothing, copied),
        "own array": (nothing, lambda: he.allreduce(x, y)),
        "mpi": (nothing, lambda: comm.Allreduce(x, y)),
        "memory": (nothing, lambda: np.add(a, b, out=c)),
    }
    if by_gloo is not None:
        kinds["gloo"] = (nothing, by_gloo(z))
    rounds = ROUNDS * (MORE if nbytes <= SMALL_BYTES else 1)
    took = np.empty((len(kinds), WARM + rounds))
    for turn in range(WARM + rounds):
        for kind, (before, act) in enumerate(kinds.values()):
            before()
            world.barrier()
            begun = time.perf_counter()
            act()
            took[kind, turn] = time.perf_counter() - begun
    np.testing.assert_allclose(total.result()[0], comm.allreduce(x.astype(np.float64)), rtol=1e-5)
    comm.Allreduce(MPI.IN_PLACE, took, MPI.MAX)
    return {kind: took[number, WARM:].tolist() for number, kind in enumerate(kinds)}


def train(job: he.Job) -> None:
    """Measure once all are there."""
    for _ in job.loop(1_000_000):
        if job.size == RANKS:
            hosts = len(job.membership.joined().board.hosts)
            with gloo(job) as by_gloo:
                found = {nbytes: measure(job, nbytes, by_gloo) for nbytes in SIZES}
            if job.leads:
                part = FILE.with_suffix(".part")
                part.write_text(json.dumps({"hosts": hosts, "seconds": found}))
                part.replace(FILE)
            break
        time.sleep(0.01)  # what it waits for are other processes


he.run(train)
