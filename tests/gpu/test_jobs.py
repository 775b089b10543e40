"""Jobs with arrays on a GPU, through resizes and a loss: by NCCL where each rank has a GPU of its own, else staged."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.arrays import gpu, nccl

from ..afterwards import happened, resizes
from ..launch import ROOT, Job, hpc_elastic
from ..rarely import also
from ..shards import write

SCRIPTS = Path(__file__).with_name("scripts")
RANKS = 3


DEVICES = ["fake", pytest.param("own", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(
    ("length", "dies"),
    [
        pytest.param(10, False, id="small"),
        pytest.param(100_000, True, id="large, one dies"),
        also(10, True, id="small, one dies"),
        also(100_000, False, id="large"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_sums_through_resizes(device, length, dies, tmp_path):
    mark = tmp_path / "mark"
    if not dies:
        mark.touch()
    options = ["--run-dir", "r", "--ranks", 1, "--slots", RANKS, "--timetable", f"5:{RANKS},50:2", "--hold"]
    command = hpc_elastic("run", *options, SCRIPTS / "sums.py", length, mark, *(["fake"] if device == "fake" else []))
    with Job(command, folder=tmp_path, environ={"PYTHONPATH": str(ROOT)}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("ranks") == "2"
    assert done.value("ways") == ("Line" if by_nccl(device) else "NoLine")
    assert len(happened(tmp_path / "r", events.Lost)) == dies
    assert resizes(tmp_path / "r")[-1].after == 2


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """Shards, and what one rank computes from them without a GPU."""
    folder = tmp_path_factory.mktemp("static")
    write(folder)
    with Job(hpc_elastic("run", "--run-dir", "r", SCRIPTS / "steps.py", folder, "host", "none"), folder=folder) as job:
        done = job.wait()
    assert done.code == 0, done.err
    return folder, done.value("loss"), done.value("sha256")


@pytest.mark.parametrize("dies", [False, True], ids=["all live", "one dies"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_of_training_are_those_of_one_rank_without_a_gpu(device, dies, static, tmp_path):
    folder, loss, sha256 = static
    mark = tmp_path / "mark"
    if not dies:
        mark.touch()
    options = ["--run-dir", "r", "--ranks", 1, "--slots", RANKS, "--timetable", f"5:{RANKS},40:2-0", "--hold"]
    kind = {"own": "gpu"}.get(device, device)
    command = hpc_elastic("run", *options, SCRIPTS / "steps.py", folder, kind, mark)
    with Job(command, folder=tmp_path, environ={"PYTHONPATH": str(ROOT)}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert (done.value("loss"), done.value("sha256")) == (loss, sha256)
    assert len(happened(tmp_path / "r", events.Lost)) == dies


def by_nccl(device):
    """Tell whether each rank has a GPU of its own."""
    return device == "own" and nccl.version() > 0 and gpu.library().cuda.runtime.getDeviceCount() >= RANKS
