"""The learning curve of a run goes on over resizes, leaders and restarts, as on one static rank; TensorBoard sees it so."""

from __future__ import annotations

import os
import signal

import pytest

from hpc_elastic import course, events
from hpc_elastic.rundir import RunDirectory

from ..launch import SCRIPTS, Job, hpc_elastic, until
from ..tensorboards import scalars

pytest.importorskip("tensorboard")

EPOCHS = 8


def run(folder, shards, *options, pause=0.0, killed_at=0):
    settings = ["--run-dir", "r", "--slots", 2, *options]
    command = hpc_elastic("run", *settings, SCRIPTS / "softmax.py", shards, EPOCHS, "--pause", pause)
    with Job(command, folder=folder) as job:
        if killed_at:
            until((folder / "r" / "status.json").exists)
            found = RunDirectory(folder / "r")
            until(lambda: found.status().step >= killed_at)
            for member in found.status().members:
                os.kill(member.pid, signal.SIGKILL)
        assert job.wait(clean=False).code == 0
    return RunDirectory(folder / "r")


def curve(run):
    """Return what was measured, by step, epoch and names."""
    values = [entry for entry in course.whole(events.read(run.events)) if isinstance(entry, course.Value)]
    found = {(value.step, value.epoch, *value.metrics): value.metrics for value in values}
    assert len(found) == len(values)
    return found


def test_the_same_curve(shards, tmp_path):
    """Two ranks and one again, rank 0 leaving, then the loss of all."""
    for name in ("static", "elastic"):
        (tmp_path / name).mkdir()
    static = run(tmp_path / "static", shards)
    elastic = run(
        tmp_path / "elastic",
        shards,
        *("--timetable", "10:2,30:1-0", "--hold", "--set", "checkpoint_steps=15"),
        pause=0.02,
        killed_at=60,
    )
    happened = events.read(elastic.events)
    assert [event.left for event in happened if isinstance(event, events.Resized)] == [(), (0,)]
    assert [event.step > 0 for event in happened if isinstance(event, events.Resumed)] == [True]
    assert curve(elastic) == curve(static)

    command = hpc_elastic("tensorboard", elastic.path)
    with Job(command, folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.out.strip().startswith(str(elastic.tensorboard / "events.out.tfevents."))
    seen = scalars(elastic.tensorboard)
    expected = {"loss": [], "epoch/loss": [], "val": []}
    for (step, epoch, name), metrics in curve(static).items():
        expected[name if epoch is None else f"epoch/{name}"].append((step, pytest.approx(metrics[name], rel=1e-6)))
    assert {tag: seen[tag] for tag in expected} == expected
    assert [step for step, _ in seen["val"]] == [*range(10, max(seen["loss"])[0] + 1, 10)]
    assert {value for _, value in seen["job/ranks"]} >= {1, 2}
