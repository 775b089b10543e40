"""The job that `benchmarks.resize` measures: small steps, 25 MB of state, and a stamp before and after every turn.

Usage: python resize_job.py numpy|tensorflow STAMPS TURNS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import hpc_elastic as he

KIND, STAMPS, TURNS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
STATE_BYTES = 25_000_000
SAMPLES = 1 << 16

if KIND == "tensorflow":
    he.keras.same_bits()
    import tensorflow as tf
    from tensorflow import keras


class Images:
    """Random images in memory."""

    chunk_samples = None

    def __init__(self) -> None:
        self._image = np.random.default_rng(0).integers(0, 256, (SAMPLES, 28, 28), np.uint8)

    def __len__(self) -> int:
        return SAMPLES

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Return some of them, with labels."""
        return {"image": self._image[samples], "label": samples % 2}


def numpy_gradients() -> object:
    """Return a function that computes a gradient in NumPy."""
    weights = np.zeros((784, 8), np.float32)

    def gradients(micro: he.Microbatch) -> list[np.ndarray]:
        x = micro["image"].reshape(len(micro), -1).astype(np.float32) / 255
        return [x.T @ np.tanh(x @ weights + 1)]

    return gradients


def tensorflow_gradients() -> object:
    """Return a function that computes a gradient with a gradient tape."""
    layers = [
        keras.Input((28, 28)),
        keras.layers.Flatten(),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.Dense(2),
    ]
    model = keras.Sequential(layers)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(input_signature=[tf.TensorSpec((None, 28, 28), tf.uint8), tf.TensorSpec((None,), tf.int64)])
    def traced(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(tf.cast(images, tf.float32) / 255))
        return tape.gradient(loss, model.trainable_variables)

    traced(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64))
    return lambda micro: traced(micro["image"], micro["label"])


def train(job: he.Job) -> None:
    """Step, and write down when each turn began and ended."""
    gradients = tensorflow_gradients() if KIND == "tensorflow" else numpy_gradients()
    job.register(state=np.zeros(STATE_BYTES // 4, np.float32))
    rows = []
    try:
        for step in job.steps(Images(), epochs=1 + TURNS * 256 // SAMPLES, batch=256):
            begun = time.time()
            for micro in step.microbatches():
                step.add(gradients(micro))
            step.reduce()
            rows.append((step.number, begun, time.time()))
            if step.number >= TURNS:
                break
    finally:
        np.save(STAMPS / f"{job.member.id}.npy", np.array(rows, np.float64).reshape(-1, 3))


if __name__ == "__main__":
    he.run(train)
