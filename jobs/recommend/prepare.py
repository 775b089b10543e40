"""Makes shards of who liked which film, MovieLens 100k, which needs no download; each viewer's last ratings are held back.

``python -m jobs.recommend.prepare --out data/recommend``
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_elastic.errors import ShardError
from hpc_elastic.pack import arrays_source, write_shards

from ..sources import read_table, ready

RATINGS = ("MovieLens100k_data", "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2")
FILMS = ("MovieLens100k_items", "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f")
VIEWERS = ("MovieLens100k_users", "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f")
LIKED = 4  # of 5 stars
HELD_BACK = 0.2  # of each viewer's ratings, the last ones
AGES = (18, 25, 35, 45, 50, 56)  # years, where one group of ages ends and the next begins
SAMPLES = {"train": 46_025, "test": 943, "films": 1_682, "viewers": 943}
KEPT = ("viewer", "film")  # of a training sample
SHARDS = {"train": 4, "test": 1, "films": 1, "viewers": 1}


class Ratings(NamedTuple):
    """Ratings, a row each, [n]: who, which film, how many stars, and when; by viewer, then by time."""

    viewer: NDArray[np.int64]
    film: NDArray[np.int64]
    stars: NDArray[np.int64]
    when_s: NDArray[np.int64]


def prepare(out: Path) -> dict[str, Path]:
    """Make four folders of shards below `out` and return their paths by name; do nothing if they are there.

    - ``train``: a sample for each film that somebody liked: ``viewer`` and ``film``, int64, numbers from 0.
    - ``test``: a sample for each viewer, all films side by side: ``seen``, uint8 [1682], is 1 for films that were
      rated in the time of training, and ``liked`` for those that were liked afterwards.
    - ``films``: ``features``, float32 [1682, 19], their genres, and ``title``, bytes in UTF-8.
    - ``viewers``: ``features``, float32 [943, 30], groups of ages, sex, occupation; 1 for what holds.

    Raises
    ------
    ShardError
        If the ratings are not installed or damaged, `out` has other shards, or it can't be written.
    """
    folders = {name: out / name for name in SHARDS}
    there = [ready(folder, (), SAMPLES[name]) for name, folder in folders.items()]
    if not all(there):
        rows = ratings()
        before = split(rows)
        parts = {
            "train": {
                name: column[before & (rows.stars >= LIKED)] for name, column in rows._asdict().items() if name in KEPT
            },
            "test": {"seen": marked(rows, before), "liked": marked(rows, ~before & (rows.stars >= LIKED))},
            "films": films(),
            "viewers": {"features": viewers()},
        }
        for name, folder in folders.items():
            write_shards(arrays_source(parts[name]), folder, SHARDS[name], overwrite=True)
    return folders


def ratings() -> Ratings:
    """Return all ratings, of each viewer in the order of time."""
    table = read_table(*RATINGS)
    viewer, film, stars, when_s = (np.array(table[name]) for name in ("user_id", "movie_id", "rating", "timestamp"))
    order = np.lexsort((film, when_s, viewer))
    return Ratings(viewer[order] - 1, film[order] - 1, stars[order], when_s[order])


def split(rows: Ratings) -> NDArray[np.bool_]:
    """Return which ratings, bool [n], are before the time from which on they are held back: each viewer's first 80 %."""
    before = np.empty(len(rows.viewer), bool)
    for viewer in np.unique(rows.viewer):
        own = np.flatnonzero(rows.viewer == viewer)
        before[own] = np.arange(len(own)) < len(own) - int(len(own) * HELD_BACK)
    return before


def marked(rows: Ratings, which: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return for all pairs, uint8 [viewers, films], whether they are among the ratings `which`."""
    table = np.zeros((SAMPLES["viewers"], SAMPLES["films"]), np.uint8)
    table[rows.viewer[which], rows.film[which]] = 1
    return table


def films() -> dict[str, NDArray[Any]]:
    """Return the films' genres, float32 [1682, 19], and their titles, UTF-8 in a fixed number of bytes."""
    table = read_table(*FILMS)
    genres = list(table)[list(table).index("IMDb_URL") + 1 :]
    titles = np.array([title.encode() for title in table["movie_title"]])
    return {"features": np.stack([np.array(table[genre], np.float32) for genre in genres], axis=1), "title": titles}


def viewers() -> NDArray[np.float32]:
    """Return in which group of ages each viewer is, the sex, and which occupation, float32 [943, 30]."""
    table = read_table(*VIEWERS)
    groups = (np.digitize(table["age"], AGES), np.array(table["gender"]), np.array(table["occupation"]))
    return np.concatenate([group[:, None] == np.unique(group) for group in groups], axis=1).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and prepare what it asks for."""
    parser = argparse.ArgumentParser(prog="jobs.recommend.prepare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the folders of shards")
    chosen = parser.parse_args(arguments)
    try:
        for folder in prepare(chosen.out).values():
            print(folder)
    except ShardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
