"""What the three jobs have in common: the task, its data, and what each worker writes down. Needs NumPy alone."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.work import Stamps

BATCH, RATE, HIDDEN = 256, 0.005, 8  # over all workers; of Adam; neurons
EVERY = 10  # steps between commits of Horovod's, or snapshots for torchrun
SEED = 1


class Settings:
    """What the driver wants of a job: ``python JOB FOLDER EPOCHS PAUSE_S``.

    Attributes
    ----------
    folder : Path
        For stamps, ledgers and the result.
    epochs : int
        Passes over the data.
    pause_s : float
        Stands for a larger model: each worker waits so long in each step.
    """

    def __init__(self) -> None:
        self.folder, self.epochs, self.pause_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    def images(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of ``train`` or ``test``, uint8 [n, 28, 28], and their labels, int64 [n], mapped."""
        data = self.folder.parent / "data"
        return np.load(data / f"{part}-image.npy", mmap_mode="r"), np.load(data / f"{part}-label.npy")

    def stamps(self) -> Stamps:
        """Return where this worker's steps are stamped."""
        return Stamps(self.folder / "stamps", os.getpid())

    def pause(self) -> None:
        """Wait, in place of a larger model."""
        time.sleep(self.pause_s)

    def result(self, accuracy: float) -> None:
        """Write the result down."""
        (self.folder / "result.json").write_text(json.dumps({"accuracy": accuracy}))


class Ledger:
    """Which samples a worker is about to contribute, as hpc_elastic writes it: rows of epoch, step, attempt, sample, int64.

    Of the attempts at a step, the last one is the one that counts.
    """

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / "ledger" / f"{os.getpid()}.i64", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, epoch: int, step: int, attempt: int, samples: np.ndarray) -> None:
        """Append the rows of a step."""
        rows = np.empty((len(samples), 4), np.int64)
        rows[:] = epoch, step, attempt, 0
        rows[:, 3] = samples
        os.write(self._file, rows.tobytes())
