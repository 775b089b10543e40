"""Sums of GPU arrays beside those of NumPy arrays, while ranks come, leave and die.

Usage: sums.py LENGTH MARK [fake]. Rank 1 kills itself in turn 30, once, if there is no file MARK; with ``fake`` on a host
without a GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import hpc_elastic as he

LENGTH, MARK = int(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3:] == ["fake"]:
    import pytest

    from tests.unit import fake_cupy

    fake_cupy.install(pytest.MonkeyPatch(), devices=3)


def train(job: he.Job) -> None:
    """Compare, turn by turn."""
    import cupy

    job.gpu()
    ways = set()
    for turn in job.loop(60):
        mine = np.random.default_rng([turn, job.rank]).standard_normal(LENGTH).astype(np.float32)
        far = cupy.asarray(mine)
        if turn == 30 and job.rank == 1 and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)  # the others are in the sum
        total = he.allreduce(far)
        assert isinstance(total, cupy.ndarray)
        assert total.get().tobytes() == he.allreduce(mine).tobytes()
        np.testing.assert_allclose(he.allreduce(far, exact=False).get(), total.get(), rtol=1e-4, atol=1e-4)
        last = he.broadcast(far if job.rank == job.size - 1 else None, job.size - 1)
        parts = he.allgather(far)
        assert last.get().tobytes() == parts[-1].get().tobytes()
        if job.size > 1:
            ways.add(type(job.membership.joined().keep("nccl", object)).__name__)
        time.sleep(0.01)  # stands for a computation
    if job.leads:
        print("ranks", job.size)
        print("ways", *sorted(ways), flush=True)


he.run(train)
