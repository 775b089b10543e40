"""Callbacks in an elastic `fit`: nobody stops alone, and ranks whose callbacks did otherwise say so instead of drifting."""

from __future__ import annotations

import pytest

from hpc_elastic import events

from ..afterwards import happened, resizes
from ..launch import SCRIPTS, Job, hpc_elastic, mpiexec
from ..rarely import also

pytestmark = pytest.mark.tensorflow
TWO = ("--slots", 2, "--timetable", "8:2", "--hold")  # the newcomer begins in the second epoch of six steps


def run(folder, what, *options, step=0):
    with Job(hpc_elastic("run", *options, SCRIPTS / "callbacks.py", what, step), folder=folder, limit_s=100) as job:
        return job.wait()


@pytest.mark.parametrize(("what", "steps"), [also("epoch", 18), ("batch", 15), also("other", 24)])
def test_the_leader_alone_stops(what, steps, tmp_path):
    """At the end of an epoch, and one step after its wish; the wish of another rank does not count."""
    done = run(tmp_path, what, *TWO, "--run-dir", "r")
    assert done.code == 0, done.err
    assert [done.value(f"rank{rank}") for rank in (0, 1)] == [f"epochs {(steps + 5) // 6} steps {steps}"] * 2
    epochs = happened(tmp_path / "r", events.Epoch)
    assert [epoch.samples for epoch in epochs] == [120] * (steps // 6) + [20 * (steps % 6)] * (steps % 6 > 0)
    assert epochs[-1].metrics["loss"] > 0
    assert [end.steps for end in happened(tmp_path / "r", events.Ended)] == [steps]


@pytest.mark.parametrize("what", ["rate", "weights"])
@pytest.mark.all_faults
def test_ranks_that_differ_raise(what, tmp_path):
    done = run(tmp_path, what, *TWO)
    assert done.code != 0
    for rank in (0, 1):
        assert "keep=[" in done.value(f"rank{rank}"), done.err


def test_fits_of_what_is_compiled_anew(tmp_path):
    """On one rank: graphs are traced anew, and samples that Keras had before are not taken for those that it has."""
    done = run(tmp_path, "again")
    assert done.code == 0, done.err


ASLEEP = {"3:1-0,15:1-0,20:2": 2, "3:1-1,20:2": 2, "3:1-1": 1}  # in the first and third epoch, and who is there in the end


@pytest.mark.parametrize("table", ASLEEP)
@pytest.mark.all_faults
def test_ranks_that_sleep_meanwhile(table, tmp_path):
    """They come back epochs later, as the leader too, or never; what is said once is said once."""
    said, curves = [], []
    both = {"HPC_ELASTIC_RUN_DIR": "r", "HPC_ELASTIC_SLOTS": "2"}
    for n, settings in ((2, {"TIMETABLE": table, "POLICY": "timetable", "HOLD": "true"}), (1, {})):
        folder = tmp_path / str(n)
        folder.mkdir()
        environ = both | {f"HPC_ELASTIC_{name}": value for name, value in settings.items()}
        command = [*mpiexec(n), SCRIPTS / "callbacks.py", "sleep", "0"]
        with Job(command, folder=folder, limit_s=100, environ=environ) as job:
            done = job.wait()
        assert done.code == 0, done.err
        said.append(done.value("slept"))
        assert len([line for line in done.out.splitlines() if line.startswith("slept")]) == min(n, ASLEEP[table])
        assert len([line for line in done.out.splitlines() if line.startswith("6/6")]) == 4
        assert [line.split(",")[0] for line in (folder / "log.csv").read_text().splitlines()] == ["epoch", *"0123"]
        measured = happened(folder / "r", events.Measured)
        curves.append([(event.step, event.metrics) for event in measured if "val_loss" in event.metrics])
    assert said[0] == said[1]
    assert curves[0] == curves[1]


@pytest.mark.all_faults
def test_a_rank_that_sleeps_until_a_further_fit(tmp_path):
    """It has what was made meanwhile: of the fit that it left, too."""
    settings = {"HPC_ELASTIC_TIMETABLE": "3:1-0,8:2", "HPC_ELASTIC_POLICY": "timetable", "HPC_ELASTIC_HOLD": "true"}
    with Job([*mpiexec(2), SCRIPTS / "callbacks.py", "fits", "0"], folder=tmp_path, limit_s=100, environ=settings) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert len([line for line in done.out.splitlines() if line.startswith("fits")]) == 2
    assert done.value("fits") == run(tmp_path, "fits").value("fits")


@pytest.mark.all_faults
def test_a_newcomer_of_a_further_fit(tmp_path):
    """It has what the fit before it made, at once, and of its own; another model's fit leaves the next one alone."""
    done = run(tmp_path, "fits", *TWO, "--run-dir", "r")  # the first one has less steps than that
    assert done.code == 0, done.err
    assert [(resize.step, resize.after) for resize in resizes(tmp_path / "r")] == [(8, 2)]
    assert len([line for line in done.out.splitlines() if line.startswith("fits")]) == 2
    assert done.value("fits") == run(tmp_path, "fits").value("fits")  # of one rank


@pytest.mark.all_faults
def test_a_restart_within_a_further_fit(tmp_path):
    """What the fit before it made is known at once, and in the end."""
    done = run(tmp_path, "fits", "--set", "checkpoint_steps=4", "--run-dir", "r", step=9)
    assert done.code == 0, done.err
    assert len(happened(tmp_path / "r", events.Restarted)) == 1
    assert done.value("fits") == run(tmp_path, "fits").value("fits")


@pytest.mark.all_faults
def test_callbacks_of_the_leader_go_on_elsewhere(tmp_path):
    """Its file is gone on with, under one head line; the best of all epochs is known to who leads at the end."""
    done = run(tmp_path, "logger", "--slots", 3, "--timetable", "3:3,13:2-0", "--hold")
    assert done.code == 0, done.err
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "0", "1", "2", "3"]
    best = float(done.value("rank0").split()[1])
    assert best == min(float(line.split(",")[2]) for line in lines[1:])
