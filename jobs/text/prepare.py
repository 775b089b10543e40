"""Makes shards of customers' reviews of clothing, which need no download: rows of numbered words, and what to tell of them.

``python -m jobs.text.prepare --task department --out data/text-department``
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpc_elastic.errors import ShardError
from hpc_elastic.pack import arrays_source, write_shards

from ..sources import read_table, ready

REVIEWS = "WomensClothingE-CommerceReviews"
REVIEWS_SHA256 = "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd"
TASKS = {
    "department": ("Bottoms", "Dresses", "Intimate", "Jackets", "Tops", "Trend"),
    "recommended": ("not recommended", "recommended"),
}
LENGTH = 128  # words of a review; the longest has 125
LEAST_USES = 3  # a word that is rarer in the training reviews is unknown
PAD, UNKNOWN, FIRST = 0, 1, 2  # numbers of words; the most frequent one is the first
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|[!?]")
HELD_BACK = 5  # one in so many is a test review
SHARDS = {"train": 4, "test": 2}
SAMPLES = {"train": 17_997, "test": 4_624}


class Review(NamedTuple):
    """A title and what follows it, and what the customer said by other means."""

    text: str
    department: str
    recommended: int


def prepare(task: str, out: Path) -> tuple[Path, Path]:
    """Make the folders ``train`` and ``test`` of shards below `out`, and ``words.txt``; do nothing if they are there.

    A sample is ``tokens``, int32 [128], numbers of words with 0 behind the last one, and ``label``, int64. ``words.txt``
    has the words in the order of their numbers, the first of which is 2.

    Parameters
    ----------
    task : str
        ``department``, to tell what sort of clothing a review is of, or ``recommended``, to tell whether its author
        recommends it.
    out : Path
        Folder to write to.

    Returns
    -------
    tuple of Path
        The folders of the training and of the test shards.

    Raises
    ------
    ShardError
        If the reviews are not installed or damaged, `out` has other shards, or it can't be written.
    """
    if task not in TASKS:
        raise ShardError(f"no task {task!r}: there are {tuple(TASKS)}")
    folders = {part: out / part for part in SHARDS}
    there = [ready(folder, TASKS[task], SAMPLES[part]) for part, folder in folders.items()]
    if not all(there) or not (out / "words.txt").exists():
        parts = dict(zip(SHARDS, split(reviews()), strict=True))
        words = vocabulary(review.text for review in parts["train"])
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "words.txt").write_text("\n".join(words) + "\n")
        except OSError as error:
            raise ShardError(f"{out} can't be written to, {error.strerror}: choose another folder") from error
        for part, folder in folders.items():
            arrays = {"tokens": numbered((review.text for review in parts[part]), words), "label": labels(parts[part], task)}
            write_shards(arrays_source(arrays, TASKS[task]), folder, SHARDS[part], overwrite=True)
    return folders["train"], folders["test"]


def reviews() -> list[Review]:
    """Return all reviews that have a text and a department, in their order; of equal texts the first one."""
    table = read_table(REVIEWS, REVIEWS_SHA256)
    columns = (table[name] for name in ("Title", "Review Text", "Department Name", "Recommended IND"))
    found: dict[str, Review] = {}
    for title, text, department, recommended in zip(*columns, strict=True):
        if text and department:
            found.setdefault(text, Review(f"{title}\n{text}" if title else text, department, recommended))
    return list(found.values())


def split(everything: Sequence[Review]) -> tuple[list[Review], list[Review]]:
    """Return the reviews for training and those held back: by their text, so that no other thing has a say."""
    parts: tuple[list[Review], list[Review]] = ([], [])
    for review in everything:
        parts[zlib.crc32(review.text.encode()) % HELD_BACK == 0].append(review)
    return parts


def vocabulary(texts: Iterable[str]) -> list[str]:
    """Return the words that are used often enough, the most frequent ones first."""
    uses = Counter(word for text in texts for word in WORD.findall(text.lower()))
    return sorted((word for word, n in uses.items() if n >= LEAST_USES), key=lambda word: (-uses[word], word))


def numbered(texts: Iterable[str], words: Sequence[str]) -> NDArray[np.int32]:
    """Return the numbers of the words of each text, int32 [n, 128]."""
    number = {word: FIRST + index for index, word in enumerate(words)}
    rows = [[number.get(word, UNKNOWN) for word in WORD.findall(text.lower())[:LENGTH]] for text in texts]
    tokens = np.full((len(rows), LENGTH), PAD, np.int32)
    for row, found in zip(tokens, rows, strict=True):
        row[: len(found)] = found
    return tokens


def labels(some: Sequence[Review], task: str) -> NDArray[np.int64]:
    """Return what there is to tell of each review, int64 [n]."""
    if task == "recommended":
        return np.array([review.recommended for review in some], np.int64)
    return np.array([TASKS[task].index(review.department) for review in some], np.int64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and prepare what it asks for."""
    parser = argparse.ArgumentParser(prog="jobs.text.prepare", description=__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default="department")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the folders train and test of shards, and the words"
    )
    chosen = parser.parse_args(arguments)
    try:
        for folder in prepare(chosen.task, chosen.out):
            print(folder)
    except ShardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
