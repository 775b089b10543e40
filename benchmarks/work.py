"""What benchmarked jobs have in common: images, gradients, and stamps of the steps done. The jobs are run as scripts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import hpc_elastic as he

SIDE, DRAWN = 28, 4096
ROW = np.dtype([("time", "f8"), ("step", "i8"), ("size", "i8"), ("member", "i8")])

Gradients = Callable[["he.Microbatch"], list[np.ndarray]]


class Images:
    """Random images in memory: a few, over and over, so that newcomers need not draw many."""

    chunk_samples = None

    def __init__(self, n: int) -> None:
        self._n = n
        self._image = np.random.default_rng(0).integers(0, 256, (DRAWN, SIDE, SIDE), np.uint8)

    def __len__(self) -> int:
        return self._n

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Return some of them, with labels."""
        return {"image": self._image[samples % DRAWN], "label": samples % 2}


def gradients_of(kind: str, width: int = 8) -> Gradients:
    """Return a function that computes a gradient, of ``numpy``, ``tensorflow`` or a ``cnn``, for `width` neurons."""
    return numpy_gradients(width) if kind == "numpy" else tensorflow_gradients(width, convolutions=kind == "cnn")


def numpy_gradients(width: int) -> Gradients:
    """Return a function that computes a gradient in NumPy."""
    weights = np.zeros((SIDE * SIDE, width), np.float32)

    def gradients(micro: he.Microbatch) -> list[np.ndarray]:
        x = micro["image"].reshape(len(micro), -1).astype(np.float32) / 255
        return [x.T @ np.tanh(x @ weights + 1)]

    return gradients


def tensorflow_gradients(width: int, *, convolutions: bool = False) -> Gradients:
    """Return a function that computes a gradient with a gradient tape, of a dense network or one with convolutions."""
    import hpc_elastic as he

    he.keras.same_bits()
    import tensorflow as tf
    from tensorflow import keras

    layers = [
        keras.Input((SIDE, SIDE)),
        *(convolutional(keras.layers) if convolutions else []),
        keras.layers.Flatten(),
        keras.layers.Dense(width, activation="relu"),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential(layers)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(input_signature=[tf.TensorSpec((None, SIDE, SIDE), tf.uint8), tf.TensorSpec((None,), tf.int64)])
    def traced(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(tf.cast(images, tf.float32) / 255))
        return tape.gradient(loss, model.trainable_variables)

    traced(np.zeros((1, SIDE, SIDE), np.uint8), np.zeros(1, np.int64))
    return lambda micro: traced(micro["image"], micro["label"])


def convolutional(layers: Any) -> list[Any]:
    """Return two convolutions, with what goes with them."""
    return [
        layers.Reshape((SIDE, SIDE, 1)),
        *(layers.Conv2D(8, 3, activation="relu"), layers.BatchNormalization(), layers.MaxPooling2D()),
        *(layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(), layers.Dropout(0.25)),
    ]


class Stamps:
    """Writes down every step that a process has finished, so that a kill loses none: a row of `ROW` each.

    Parameters
    ----------
    folder : Path
        Where; the file's name is that of the process: its number in the job and its pid.
    member : int
        Number of the process in the job.
    """

    def __init__(self, folder: Path, member: int) -> None:
        self._path = folder / f"{member}-{os.getpid()}"
        self._member = member
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def finished(self, step: int, size: int) -> None:
        """Take down that `step` is done, by `size` ranks."""
        os.write(self._file, np.array([(time.time(), step, size, self._member)], ROW).tobytes())

    def began(self, **times: float) -> None:
        """Take down when stages of the process's beginning were."""
        self._path.with_suffix(".json").write_text(json.dumps({"born": born(), **times}))


def born() -> float:
    """Return when this process was started, within 10 ms."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
