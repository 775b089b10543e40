"""The TensorFlow job: the same bits through random timetables, and the accuracy it is made for."""

from __future__ import annotations

import pytest

from jobs.image.prepare import prepare

from ..afterwards import resizes
from ..launch import Job, hpc_elastic
from .test_same_bits import check_ledger, seeds, sizes
from .test_same_bits import timetable as random_timetable

pytestmark = pytest.mark.tensorflow
EPOCHS = 2  # 64 steps; the timetables' 48 lie within


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", "upright", folder / "digits-upright")
    return folder


def train(data, folder, *options, epochs=EPOCHS):
    """Run the image job."""
    command = hpc_elastic("run", "--run-dir", "r", *options, "-m", "jobs.image.train", "--epochs", epochs, "--folder", data)
    with Job(command, folder=folder, limit_s=180) as job:
        done = job.wait()
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def static(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("static")).value("sha256")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config, range(100, 105), 1))


def test_random_timetables(seed, data, static, tmp_path):
    table = random_timetable(seed)
    print(f"seed {seed}: {table}")
    done = train(data, tmp_path, "--slots", 5, "--max", 4, "--timetable", table, "--set", "ledger=true", "--hold")
    assert done.value("sha256") == static
    assert [event.after for event in resizes(tmp_path / "r")] == sizes(table)
    check_ledger(tmp_path / "r", EPOCHS, 8000)


def test_accuracy(data, tmp_path):
    done = train(data, tmp_path, epochs=3)
    assert float(done.value("accuracy").split()[0]) >= 0.92
    assert len([line for line in done.out.splitlines() if line.startswith(("actual", "predicted"))]) == 2
