"""Callbacks in an elastic `fit`: nobody stops alone, and ranks whose callbacks did otherwise say so instead of drifting."""

from __future__ import annotations

import importlib.util

import pytest

from ..launch import SCRIPTS, Job, hpc_elastic

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None, reason="make setup installs TensorFlow with MPICH only"
    ),
]
TWO = ("--slots", 2, "--timetable", "8:2", "--hold")  # the newcomer begins in the second epoch of six steps


def run(folder, what, *options):
    with Job(hpc_elastic("run", *options, SCRIPTS / "callbacks.py", what), folder=folder, limit_s=100) as job:
        return job.wait()


@pytest.mark.parametrize(("what", "steps"), [("epoch", 18), ("batch", 15), ("other", 24)])
def test_the_leader_alone_stops(what, steps, tmp_path, pytestconfig):
    """At the end of an epoch, and one step after its wish; the wish of another rank does not count."""
    if what != "batch" and not pytestconfig.getoption("all_faults"):
        pytest.skip("one of --all-faults")
    done = run(tmp_path, what, *TWO)
    assert done.code == 0, done.err
    assert [done.value(f"rank{rank}") for rank in (0, 1)] == [f"epochs {(steps + 5) // 6} steps {steps}"] * 2


@pytest.mark.parametrize("what", ["rate", "weights"])
@pytest.mark.usefixtures("all_faults")
def test_ranks_that_differ_raise(what, tmp_path):
    done = run(tmp_path, what, *TWO)
    assert done.code != 0
    for rank in (0, 1):
        assert "keep=[" in done.value(f"rank{rank}"), done.err


def test_fits_of_what_is_compiled_anew(tmp_path):
    """On one rank: graphs are traced anew, and samples that Keras had before are not taken for those that it has."""
    done = run(tmp_path, "again")
    assert done.code == 0, done.err


@pytest.mark.usefixtures("all_faults")
def test_callbacks_of_the_leader_go_on_elsewhere(tmp_path):
    """Its file is gone on with, under one head line; the best of all epochs is known to who leads at the end."""
    done = run(tmp_path, "logger", "--slots", 3, "--timetable", "3:3,13:2-0", "--hold")
    assert done.code == 0, done.err
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1", "2", "3"]
    best = float(done.value("rank0").split()[1])
    assert best == min(float(line.split(",")[2]) for line in lines[1:])
