"""The job with hpc_elastic, as its documentation has it: ``job.steps``, 16 microbatches, same bits at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import hpc_elastic as he
from benchmarks.peers.common import BATCH, HIDDEN, RATE, SEED, Settings

he.keras.same_bits(threads=1, seed=SEED)

import tensorflow as tf  # noqa: E402  (after the settings that it reads when it starts)
from tensorflow import keras  # noqa: E402


def train(job: he.Job) -> None:
    """Train, then classify held-back images."""
    settings = Settings()
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(HIDDEN, activation="relu"),
            layers.Dense(2),
        ]
    )
    optimizer = keras.optimizers.Adam(RATE)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(input_signature=[tf.TensorSpec((None, 28, 28), tf.uint8), tf.TensorSpec((None,), tf.int64)])
    def gradients(images: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        return tape.gradient(loss, model.trainable_variables)

    job.register(model=he.keras.State(model, optimizer))
    with he.open_shards(Path(settings.folder.parent / "data" / "train")) as shards:
        gradients(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64))  # traced before joining: nobody waits for it
        stamps = settings.stamps()
        for step in job.steps(shards, epochs=settings.epochs, batch=BATCH):
            for micro in step.microbatches():
                step.add(gradients(micro["image"], micro["label"]))
            optimizer.apply(step.reduce(), model.trainable_variables)
            stamps.finished(step.number, job.size)
            settings.pause()
    if job.leads:
        images, labels = settings.images("test")
        settings.result(float(np.mean(np.argmax(model(np.array(images)), axis=1) == labels)))


if __name__ == "__main__":
    he.run(train)
