"""Recommender of two towers that trains on while its ranks come and go: which films somebody will like next.

hpc-elastic run --slots 4 --timetable 40:3,300:2-0 -m jobs.recommend.train
python -m jobs.recommend.train
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import hpc_elastic as he

from .prepare import prepare
from .ranking import first, rank

he.keras.same_bits(threads=1, seed=1)

import tensorflow as tf  # noqa: E402  (after the settings that it reads when it starts)
from tensorflow import keras  # noqa: E402


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where the shards are, or will be, put")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=64, help="length of the vectors of viewers and films")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate at the start; it falls to 0")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--dropout", type=float, default=0.5)
    return parser.parse_args()


class Tower(keras.layers.Layer):
    """A vector for each viewer, or film: one of its own and those of its features, added up.

    Parameters
    ----------
    features : ndarray
        Of each, float32 [n, features].
    width : int
        Length of the vectors.
    """

    def __init__(self, features: NDArray[np.float32], width: int) -> None:
        super().__init__()
        self.features, self.width = features, width

    def build(self, _: object) -> None:
        """Make the vectors."""
        (n, features), few = self.features.shape, keras.initializers.RandomNormal(stddev=0.05)
        self.own = self.add_weight(shape=(n, self.width), initializer=few, name="own")
        self.shared = self.add_weight(shape=(features, self.width), initializer="zeros", name="shared")

    def call(self, which: tf.Tensor) -> tf.Tensor:
        """Return the vectors of those with these numbers, [n] to [n, width]."""
        features = keras.ops.take(self.features, which, axis=0)
        return keras.ops.take(self.own, which, axis=0) + keras.ops.matmul(features, self.shared)


class Towers(keras.Model):
    """Scores of all films for some viewers: the products of their vectors, and how much each film is liked by all."""

    def __init__(self, viewers: NDArray[np.float32], films: NDArray[np.float32], width: int, dropout: float) -> None:
        super().__init__()
        self.viewers, self.films = Tower(viewers, width), Tower(films, width)
        self.dropout = keras.layers.Dropout(dropout)
        self.everything = np.arange(len(films))

    def build(self, shape: tuple[int | None, ...]) -> None:
        """Make the towers, and what is the films' own."""
        self.viewers.build(shape)
        self.films.build(shape)
        self.liked = self.add_weight(shape=self.everything.shape, initializer="zeros", name="liked")

    def call(self, viewer: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Return scores, [n] to [n, films]."""
        vectors = self.dropout(self.viewers(viewer), training=training)
        return keras.ops.matmul(vectors, keras.ops.transpose(self.films(self.everything))) + self.liked


def everything(folder: Path) -> dict[str, NDArray[np.generic]]:
    """Return all samples in `folder`, by field."""
    with he.open_shards(folder) as shards:
        return dict(shards.gather(np.arange(len(shards))))


def train(job: he.Job) -> None:
    """Train, then recommend films to all viewers, and see whether they liked them."""
    settings = parse()
    folder = settings.folder / "recommend"
    viewers, films = (everything(folder / name) for name in ("viewers", "films"))
    model = Towers(viewers["features"], films["features"], settings.width, settings.dropout)
    elastic = he.keras.Elasticity(job)
    with he.open_shards(folder / "train") as shards:
        liked = he.keras.data(shards, settings.batch, inputs="viewer", targets="film")
        rate = keras.optimizers.schedules.CosineDecay(settings.rate, settings.epochs * len(liked))
        # Which film a viewer liked, out of all: a softmax over the films needs no dislikes to be made up.
        model.compile(
            keras.optimizers.AdamW(rate, weight_decay=settings.decay),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(liked, epochs=settings.epochs, callbacks=[elastic], verbose=2)
    all_viewers = he.keras.data({"viewer": np.arange(len(viewers["features"]))}, 128)
    scores = model.predict(all_viewers, callbacks=[elastic], verbose=0)  # by all ranks, each viewer once

    if job.leads:
        report(scores, everything(folder / "test"), [title.decode() for title in films["title"]])
        print(f"sha256     {he.keras.weights_sha256(model.get_weights())}", flush=True)


def report(scores: NDArray[np.float32], test: dict[str, NDArray[np.uint8]], titles: list[str]) -> None:
    """Print how good the recommendations are, and some of them."""
    best = first(scores, test["seen"], 4)
    for viewer in np.linspace(0, len(best) - 1, 4).astype(int):
        films = (titles[film] + (" (liked)" if test["liked"][viewer, film] else "") for film in best[viewer])
        print(f"viewer {viewer + 1}: {', '.join(films)}")
    found = rank(scores, test["seen"], test["liked"])
    print(f"ndcg@10    {found.ndcg:.4f} over {found.viewers} viewers")
    print(f"recall@10  {found.recall:.4f}")


if __name__ == "__main__":
    given = parse()
    prepare(given.folder / "recommend")
    he.run(train)
