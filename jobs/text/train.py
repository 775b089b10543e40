"""Text classifier that trains on while its ranks come and go: of what sort of clothing a review is, or whether it is good.

hpc-elastic run --slots 4 --timetable 40:3,120:2-0 -m jobs.text.train
python -m jobs.text.train --task recommended
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hpc_elastic as he

from .prepare import FIRST, LENGTH, PAD, TASKS, prepare

he.keras.same_bits(threads=1, seed=1)

import tensorflow as tf  # noqa: E402  (after the settings that it reads when it starts)
from tensorflow import keras  # noqa: E402


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="department")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where the shards are, or will be, put")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=32, help="length of a word's vector")
    parser.add_argument("--rate", type=float, default=0.005, help="learning rate")
    return parser.parse_args()


class Attention(keras.layers.Layer):
    """The mean of the words' vectors, [n, words, width] to [n, width], each with the weight that it asks for."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Make the vector that tells which words matter."""
        self.query = self.add_weight(shape=shape[-1:], initializer=keras.initializers.RandomNormal(stddev=0.1), name="query")

    def call(self, vectors: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
        """Leave out what is no word."""
        wanted = keras.ops.where(tokens == PAD, -1e9, keras.ops.matmul(vectors, self.query))
        return keras.ops.sum(keras.ops.softmax(wanted)[..., None] * vectors, axis=1)


def build(words: int, width: int, classes: int) -> keras.Model:
    """Return a network of word vectors, attention, and one layer that decides."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    vectors = keras.layers.Embedding(words, width)(tokens)
    return keras.Model(tokens, keras.layers.Dense(classes)(Attention()(vectors, tokens)))


def train(job: he.Job) -> None:
    """Train, then classify held-back reviews."""
    settings = parse()
    folder = settings.folder / f"text-{settings.task}"
    words = (folder / "words.txt").read_text().split("\n")[:-1]
    model = build(FIRST + len(words), settings.width, len(TASKS[settings.task]))
    model.compile(
        keras.optimizers.Adam(settings.rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    elastic = he.keras.Elasticity(job)
    with he.open_shards(folder / "train") as shards, he.open_shards(folder / "test") as held_back:
        reviews, test = he.keras.data(shards, settings.batch), he.keras.data(held_back, 1024)
        model.fit(reviews, epochs=settings.epochs, validation_data=test, callbacks=[elastic], verbose=2)
        scores = model.predict(test, callbacks=[elastic], verbose=0)  # by all ranks, each review once
        samples = held_back.gather(np.arange(len(held_back)))

    if job.leads:
        report(scores, samples, words, TASKS[settings.task])
        print(f"sha256     {he.keras.weights_sha256(model.get_weights())}", flush=True)


def report(
    scores: NDArray[np.float32], samples: Mapping[str, NDArray[np.generic]], words: list[str], names: tuple[str, ...]
) -> None:
    """Print the accuracy on the test reviews, and some of them."""
    predicted, actual = scores.argmax(axis=1), samples["label"]
    for some in np.linspace(0, len(actual) - 1, 4).astype(int):
        text = " ".join(words[token - FIRST] if token >= FIRST else "…" for token in samples["tokens"][some] if token != PAD)
        print(f"{names[actual[some]]:<10} taken for {names[predicted[some]]:<10} {text[:80]}")
    print(f"accuracy   {np.mean(predicted == actual):.4f} on {len(actual)} reviews held back")
    recalls = [np.mean(predicted[actual == label] == label) for label in np.unique(actual)]
    print(f"balanced   {np.mean(recalls):.4f} over the classes")


if __name__ == "__main__":
    given = parse()
    prepare(given.task, given.folder / f"text-{given.task}")
    he.run(train)
