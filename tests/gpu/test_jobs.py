"""Jobs with arrays on a GPU, through resizes and a loss: by NCCL where each rank has a GPU of its own, else staged."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.arrays import gpu, nccl

from ..afterwards import happened, resizes
from ..launch import ROOT, Job, hpc_elastic

SCRIPT = Path(__file__).with_name("scripts") / "sums.py"
RANKS = 3


@pytest.mark.parametrize("length", [10, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("dies", [False, True], ids=["all live", "one dies"])
@pytest.mark.parametrize("device", ["fake", pytest.param("own", marks=pytest.mark.gpu)])
def test_sums_through_resizes(device, length, dies, tmp_path):
    mark = tmp_path / "mark"
    if not dies:
        mark.touch()
    options = ["--run-dir", "r", "--ranks", 1, "--slots", RANKS, "--timetable", f"5:{RANKS},50:2", "--hold"]
    command = hpc_elastic("run", *options, SCRIPT, length, mark, *(["fake"] if device == "fake" else []))
    with Job(command, folder=tmp_path, environ={"PYTHONPATH": str(ROOT)}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("ranks") == "2"
    assert done.value("ways") == ("Line" if by_nccl(device) else "NoLine")
    assert len(happened(tmp_path / "r", events.Lost)) == dies
    assert resizes(tmp_path / "r")[-1].after == 2


def by_nccl(device):
    """Tell whether each rank has a GPU of its own."""
    return device == "own" and nccl.version() > 0 and gpu.library().cuda.runtime.getDeviceCount() >= RANKS
