"""Sums of users' own arrays while ranks come, leave, and die in the middle of one."""

from __future__ import annotations

import pytest

from hpc_elastic import events

from ..afterwards import happened, resizes
from ..launch import Job, hpc_elastic
from ..rarely import also

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
import hpc_elastic as he
from hpc_elastic.comm import board

LENGTH, MARK = int(sys.argv[1]), Path(sys.argv[2])
if "apart" in sys.argv:  # as if each rank were on a host of its own
    board._page = lambda pid, card: None

def train(job):
    for turn in job.loop(60):
        mine = np.full(LENGTH, job.rank + 1.0)
        if turn == 30 and job.rank == 1 and not MARK.exists():
            MARK.touch()
            os.kill(os.getpid(), signal.SIGKILL)  # the others are in the sum
        total = he.allreduce(mine)
        assert (total == job.size * (job.size + 1) / 2).all()
        assert he.broadcast(turn if job.rank == job.size - 1 else None, job.size - 1) == turn
        assert [len(part) for part in he.allgather(mine[: job.rank])] == list(range(job.size))
        time.sleep(0.01)  # stands for a computation
    if job.leads:
        print("ranks", job.size, flush=True)

he.run(train)
"""


@pytest.mark.parametrize(
    ("length", "where", "dies"),
    [
        pytest.param(10, "near", False, id="small"),
        pytest.param(100_000, "near", True, id="large, one dies"),
        pytest.param(1_000_000, "apart", False, id="by messages"),
        pytest.param(1_000_000, "apart", True, id="by messages, one dies"),
        also(10, "near", True, id="small, one dies"),
        also(100_000, "near", False, id="large"),
    ],
)
def test_own_arrays(length, where, dies, tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    mark = tmp_path / "mark"
    if not dies:
        mark.touch()
    options = ["--run-dir", "r", "--ranks", 1, "--slots", 3, "--timetable", "5:3,50:2", "--hold"]
    with Job(hpc_elastic("run", *options, tmp_path / "own.py", length, mark, where), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("ranks") == "2"
    assert len(happened(tmp_path / "r", events.Lost)) == dies
    assert resizes(tmp_path / "r")[-1].after == 2
