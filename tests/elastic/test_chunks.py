"""Compressed shards and decoding ahead: the same bits through resizes and losses, and no chunk is left in memory."""

from __future__ import annotations

import h5py
import pytest

from hpc_elastic.config import FAULT_VARIABLE
from hpc_elastic.shards import open_shards

from ..afterwards import check_ledger, resizes
from ..launch import SCRIPTS, Job, hpc_elastic
from ..shards import SAMPLES

EPOCHS = 3


@pytest.fixture(scope="module")
def chunked(shards, tmp_path_factory):
    """The same shards, compressed chunk by chunk."""
    folder = tmp_path_factory.mktemp("chunked")
    with open_shards(shards) as opened:
        for part, (start, stop) in enumerate(((0, 500), (500, SAMPLES))):
            with h5py.File(folder / f"{part}.h5", "w") as file:
                for name, array in opened.gather(range(start, stop)).items():
                    file.create_dataset(name, data=array, chunks=(20, *array.shape[1:]), compression="gzip")
    return folder


def outcome_of(folder, chunked, *, fault="", table=""):
    """Return what a job computes."""
    options = ["--run-dir", "r", "--slots", 4, "--hold", "--set", "ledger=true", *(("--timetable", table) if table else ())]
    command = hpc_elastic("run", *options, SCRIPTS / "softmax.py", chunked, EPOCHS, "--noise")
    with Job(command, folder=folder, environ={FAULT_VARIABLE: fault} if fault else {}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    check_ledger(folder / "r", EPOCHS, SAMPLES)
    return done.value("sha256"), [event.after for event in resizes(folder / "r")]


@pytest.fixture(scope="module")
def static(chunked, tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("static"), chunked)[0]


def test_through_resizes(chunked, static, tmp_path):
    found, sizes = outcome_of(tmp_path, chunked, table="5:3,12:2-0,25:4,40:1")
    assert sizes == [3, 2, 4, 1]
    assert found == static


@pytest.mark.parametrize("fault", ["sum:kill:rank=1:step=20", "point:kill:rank=0:step=20"])
def test_through_a_loss(fault, chunked, static, tmp_path):
    found, sizes = outcome_of(tmp_path, chunked, table="5:3", fault=fault)
    assert sizes[0] == 3
    assert found == static
