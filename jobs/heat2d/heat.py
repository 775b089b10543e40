"""A heated plate: Jacobi iterations on a distributed array, resized while it runs; the same bits as on one rank.

    hpc-elastic run --policy timetable --timetable 300:3,900:2-0 --max 4 --slots 4 -m jobs.heat2d.heat --png plate.png
    mpirun -n 2 python -m jobs.heat2d.heat

Each turn replaces every inner point by the mean of its four neighbours. A rank holds a block of rows and needs one row of
each neighbour. Sums are formed point by point in one order, so that the blocks' borders leave no trace in the result.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np

import hpc_elastic as he


def parse() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="points along each side")
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--png", type=Path, help="where to draw the plate")
    parser.add_argument("--check", action="store_true", help="compare with the same turns on one rank")
    return parser.parse_args()


def heat(rows: np.ndarray, first: int, size: int) -> None:
    """Set the borders of `rows`, which begin at row `first` of the plate: a hot lamp in the middle of the top edge."""
    rows[:, 0] = rows[:, -1] = 0.0
    if first == 0 and len(rows):
        rows[0] = 0.0
        rows[0, size // 4 : -(size // 4)] = 100.0
    if first + len(rows) == size and len(rows):
        rows[-1] = 20.0


def sweep(rows: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return `rows` after one turn; `above` and `below` are the rows next to them, none at the plate's ends."""
    padded = np.concatenate([above, rows, below])
    new = rows.copy()
    inner = slice(1 - len(above), len(rows) - (1 - len(below)))
    middle = padded[1:-1]
    new[inner, 1:-1] = 0.25 * ((padded[:-2, 1:-1] + padded[2:, 1:-1]) + (middle[:, :-2] + middle[:, 2:]))
    return new


def alone(size: int, turns: int) -> np.ndarray:
    """Return the plate as one process computes it, without this package."""
    plate = np.zeros((size, size))
    heat(plate, 0, size)
    none = np.empty((0, size))
    for _ in range(turns):
        plate = sweep(plate, none, none)
    return plate


def draw(plate: np.ndarray, file: Path) -> None:
    """Write a picture of the plate, blue to red."""
    from PIL import Image

    warmth = np.clip(plate / 100.0, 0, 1) ** 0.5
    colour = np.stack([warmth, 4 * warmth * (1 - warmth) * 0.6, 1 - warmth], axis=-1)
    Image.fromarray((255 * np.clip(colour, 0, 1)).astype(np.uint8)).resize((512, 512)).save(file)


def train(job: he.Job) -> None:
    """Iterate, then gather the plate on rank 0."""
    settings = parse()
    size = settings.size
    plate = job.array((size, size), np.float64, name="plate")
    heat(plate.local, plate.start, size)  # a newcomer has no rows yet, and gets them when it joins
    for _ in job.loop(settings.turns):
        above, below = plate.halo(1)
        if len(plate.local):
            plate.local = sweep(plate.local, above, below)
    whole = plate.gather()
    if whole is not None:
        print(f"mean {whole.mean():.6f}  sha256 {hashlib.sha256(whole.tobytes()).hexdigest()}", flush=True)
        if settings.png:
            draw(whole, settings.png)
            print(f"wrote {settings.png}")
        if settings.check:
            same = np.array_equal(whole, alone(size, settings.turns))
            print("equal to one process, to the last bit" if same else "NOT equal to one process")
            if not same:
                raise SystemExit(1)


if __name__ == "__main__":
    he.run(train)
