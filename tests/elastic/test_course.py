"""The learning curve of a run goes on over resizes, leaders and restarts, as on one static rank; TensorBoard sees it so."""

from __future__ import annotations

import os
import signal

import pytest

from hpc_elastic import course, events
from hpc_elastic.rundir import RunDirectory

from ..afterwards import happened
from ..launch import SCRIPTS, Job, hpc_elastic, until
from ..tensorboards import scalars

pytest.importorskip("tensorboard", reason="comes with TensorFlow, which make setup installs with MPICH only")

EPOCHS = 8


def run(folder, shards, *options, pause=0.0, killed_at=0):
    settings = ["--run-dir", "r", "--slots", 2, *options]
    command = hpc_elastic(
        "run", *settings, SCRIPTS / "softmax.py", shards, EPOCHS, "--pause", pause, "--until", folder / "killed"
    )
    with Job(command, folder=folder) as job:
        if killed_at:
            until((folder / "r" / "status.json").exists)
            found = RunDirectory(folder / "r")
            until(lambda: found.status().step >= killed_at and happened(found.path, events.Checkpointed))
            for member in found.status().members:
                os.kill(member.pid, signal.SIGKILL)
            (folder / "killed").touch()
        assert job.wait(clean=False).code == 0
    return RunDirectory(folder / "r")


def curve(run):
    """Return what was measured, by step, epoch and names."""
    values = [entry for entry in course.whole(events.read(run.events)) if isinstance(entry, course.Value)]
    found = {(value.step, value.epoch, *value.metrics): value.metrics for value in values}
    assert len(found) == len(values)
    return found


FIT = """
import numpy as np
import hpc_elastic as he
he.keras.same_bits(threads=1, seed=1)
import keras
from keras import layers

def train(job):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x = np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    data = he.keras.data({"x": x, "y": y}, batch=20)
    held_back = he.keras.data({"x": x[:50], "y": y[:50]}, batch=20)
    model.fit(data, epochs=6, validation_data=held_back, callbacks=[he.keras.Elasticity(job)], verbose=0)

if __name__ == "__main__":
    he.run(train)
"""


@pytest.mark.tensorflow
@pytest.mark.all_faults
def test_fit(tmp_path):
    """Keras's metrics, and those of its validation, over a change of the leader."""
    curves = []
    for name, options in (("static", ()), ("elastic", ("--timetable", "15:2,35:1-0", "--hold"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "script.py").write_text(FIT)
        command = hpc_elastic("run", "--run-dir", "r", "--slots", 2, *options, "script.py")
        with Job(command, folder=tmp_path / name, limit_s=120) as job:
            done = job.wait()
        assert done.code == 0, done.err
        curves.append(curve(RunDirectory(tmp_path / name / "r")))
    static, elastic = curves
    assert {place: pytest.approx(metrics, rel=1e-6) for place, metrics in static.items()} == elastic
    losses = [{place: metrics for place, metrics in each.items() if "loss" in place} for each in curves]
    assert losses[0] == losses[1]
    names = {name for metrics in static.values() for name in metrics}
    assert names == {"loss", "accuracy", "val_accuracy", "val_loss"}
    assert [step for step, epoch, *names in static if "val_loss" in names] == [10, 20, 30, 40, 50, 60]


def test_the_same_curve(shards, tmp_path):
    """Two ranks and one again, rank 0 leaving, then the loss of all."""
    for name in ("static", "elastic"):
        (tmp_path / name).mkdir()
    static = run(tmp_path / "static", shards)
    elastic = run(
        tmp_path / "elastic",
        shards,
        *("--timetable", "10:2,30:1-0", "--hold", "--set", "checkpoint_steps=15"),
        pause=0.1,
        killed_at=40,
    )
    assert [event.left for event in happened(elastic.path, events.Resized)] == [(), (0,)]
    assert [event.step > 0 for event in happened(elastic.path, events.Resumed)] == [True]
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
