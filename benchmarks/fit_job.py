"""The job that `benchmarks.fit` measures: a model trained by an elastic `fit`, and by Keras alone, in turns.

Usage: python fit_job.py FILE ROUNDS MODEL:BATCH:STEPS [MODEL:BATCH:STEPS ...]

All take the same batch a rank, BATCH over all ranks. A round is STEPS of each, of which an epoch has a multiple, so that the
ends of epochs, at which Keras makes its pipeline anew, lie between rounds: of `fit` with `Elasticity`; of what
Keras's own `fit` does with arrays, its train function on its pipeline; and of Keras's own train step at the least cost, a
graph called on tensors that are ready, past the matching of arguments. Keras alone exchanges nothing. All have the hooks
that `fit` calls.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import hpc_elastic as he

he.keras.same_bits(threads=1, seed=1)

import tensorflow as tf  # noqa: E402
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter  # noqa: E402  (what `fit` makes of arrays)
from mpi4py import MPI  # noqa: E402

import keras  # noqa: E402  (after the settings that it reads when it starts)

FILE, ROUNDS = Path(sys.argv[1]), int(sys.argv[2])
SHAPES = [(name, int(batch), int(steps)) for name, batch, steps in (word.split(":") for word in sys.argv[3:])]
SAMPLES, SIDE, CLASSES = 1 << 13, 28, 10
WARM = 2
layers = keras.layers


def mlp() -> list[Any]:
    """Return the layers of the small classifier: 6 thousand parameters."""
    return [layers.Flatten(), layers.Dense(8, activation="relu"), layers.Dense(CLASSES)]


def cnn() -> list[Any]:
    """Return those of a convolutional network: 225 thousand parameters."""
    return [
        layers.Reshape((SIDE, SIDE, 1)),
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(CLASSES),
    ]


def deep() -> list[Any]:
    """Return those of a network of 41 dense layers: 746 thousand parameters in 82 variables."""
    return [layers.Flatten(), *(layers.Dense(128, activation="relu") for _ in range(40)), layers.Dense(CLASSES)]


def model_of(name: str) -> Any:
    """Return a compiled model."""
    model = keras.Sequential([keras.Input((SIDE, SIDE)), *{"mlp": mlp, "cnn": cnn, "deep": deep}[name]()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


class Fit:
    """What Keras's own `fit` of `model` does at each batch of `size` samples: its train function, on its own pipeline."""

    def __init__(self, model: Any, images: np.ndarray, labels: np.ndarray, size: int) -> None:
        adapter = ArrayDataAdapter(images, labels, batch_size=size, shuffle=True)
        self._batches = iter(adapter.get_tf_dataset().repeat())
        model._symbolic_build(data_batch=next(self._batches))  # noqa: SLF001  (no public way builds metrics, too)
        model.make_train_function()
        self.model = model

    def step(self) -> dict[str, Any]:
        """Train on the next batch, and return the logs."""
        found: dict[str, Any] = self.model.train_function(self._batches)
        return found


class Graph:
    """Keras's own train step of `model` on batches of `size` samples, which are tensors from the beginning."""

    def __init__(self, model: Any, images: np.ndarray, labels: np.ndarray, size: int) -> None:
        starts = range(0, len(images) - size + 1, size)
        given = [tuple(tf.constant(array[start : start + size]) for array in (images, labels)) for start in starts]
        self.model, self._batches = model, itertools.cycle(given)
        model._symbolic_build(data_batch=given[0])  # noqa: SLF001  (no public way builds metrics, too)
        graph = tf.function(lambda *batch: model.train_step(batch), autograph=False).get_concrete_function(*given[0])
        self._graph, self._call, self._names = graph, graph.inference_fn.call_flat, sorted(graph.structured_outputs)

    def step(self) -> dict[str, Any]:
        """Train on the next batch, and return the logs."""
        return dict(zip(self._names, self._call(*next(self._batches), *self._graph.captured_inputs), strict=True))


class Rounds(keras.callbacks.Callback):  # type: ignore[misc]
    """Times `n` steps of the elastic fit, then `n` steps of each of the ways of Keras alone, and so on."""

    def __init__(self, comm: MPI.Intracomm, alone: dict[str, Fit | Graph], n: int) -> None:
        super().__init__()
        self._comm, self._alone, self._n = comm, alone, n
        self._hooks = {name: _hooks(way.model) for name, way in alone.items()}
        self._step, self._begun = 0, 0.0
        self.took: dict[str, list[float]] = {"elastic": [], **{name: [] for name in alone}}

    def _time(self, name: str) -> float:
        hooks, way = self._hooks[name], self._alone[name]
        self._comm.Barrier()
        begun = time.perf_counter()
        for step in range(self._n):
            hooks.on_train_batch_begin(step)
            hooks.on_train_batch_end(step, way.step())
        return (time.perf_counter() - begun) / self._n

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002  (Keras's signature)
        """Begin a round."""
        if not self._step % self._n:
            self._comm.Barrier()
            self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002  (Keras's signature)
        """Go over to the next round where one is done."""
        self._step += 1
        if self._step % self._n:
            return
        self.took["elastic"].append((time.perf_counter() - self._begun) / self._n)
        if len(self.took["elastic"]) == WARM + ROUNDS:
            self.model.stop_training = True
            return
        for name in self._alone:
            self.took[name].append(self._time(name))


def _hooks(model: Any) -> Any:
    hooks = keras.callbacks.CallbackList([], add_history=True, model=model, epochs=1, steps=None, verbose=0)
    hooks.on_train_begin()
    return hooks


def measure(job: he.Job, comm: MPI.Intracomm, name: str, batch: int, n: int) -> dict[str, Any]:
    """Return the seconds of a step of each, on the slowest rank, in each round."""
    rng = np.random.default_rng(0)
    images = rng.random((SAMPLES, SIDE, SIDE), np.float32)
    labels = rng.integers(0, CLASSES, SAMPLES)
    model = model_of(name)
    own = (images, labels, batch // comm.size)
    rounds = Rounds(comm, {"fit": Fit(model_of(name), *own), "graph": Graph(model_of(name), *own)}, n)
    data = he.keras.data({"image": images, "label": labels}, batch=batch)
    model.fit(data, epochs=10_000, verbose=0, callbacks=[he.keras.Elasticity(job), rounds])
    slowest = np.array([took[-ROUNDS:] for took in rounds.took.values()])
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return {
        "parameters": model.count_params(),
        "variables": len(model.trainable_variables),
        **dict(zip(rounds.took, slowest.tolist(), strict=True)),
    }


def train(job: he.Job) -> None:
    """Measure each model."""
    comm = MPI.COMM_WORLD.Dup()  # `job.comm` notes the user's calls, which costs some
    found = [measure(job, comm, *shape) for shape in SHAPES]
    comm.Free()
    if job.leads:
        part = FILE.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(FILE)


if __name__ == "__main__":
    he.run(train)
