"""The job that `benchmarks.step` measures: one computation in three loops, in turns, in the same processes.

Usage: python step_job.py FILE ROUNDS CLASSES:BATCH:STEPS [CLASSES:BATCH:STEPS ...]

STEPS of each loop are one round. The loops are ``elastic``, `job.steps`; ``by hand``, `handwritten.train`; and ``alone``, in
which each rank computes what it computes in the elastic one, and nothing is added up.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from handwritten import Images, Labels, Softmax, pictures
from handwritten import train as by_hand
from mpi4py import MPI

import hpc_elastic as he

FILE, ROUNDS = Path(sys.argv[1]), int(sys.argv[2])
SHAPES = [tuple(int(number) for number in word.split(":")) for word in sys.argv[3:]]
SAMPLES, EPOCHS = 1 << 16, 1_000_000
WARM = 2
MEMORY_BYTES = 25 << 20


class Samples:
    """Pictures in memory, as a data set."""

    chunk_samples = None

    def __init__(self, images: Images, labels: Labels) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def gather(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Return some of them."""
        return {"image": self._images[samples], "label": self._labels[samples]}


def alone(job: he.Job, model: Softmax, images: Images, labels: Labels, batch: int) -> Iterator[None]:
    """Compute the gradients of this rank's microbatches, and update by the last of them; yield after every step."""
    micros = job.session.config.microbatches // job.size
    for epoch in range(EPOCHS):
        order = np.random.default_rng((0, epoch)).permutation(len(images))
        for start in range(0, len(order), batch):
            mine = np.array_split(order[start : start + batch], job.size)[job.rank]
            x, y = images[mine], labels[mine]
            for micro in range(micros):
                cut = slice(len(mine) * micro // micros, len(mine) * (micro + 1) // micros)
                gradient = model.gradient(x[cut], y[cut], len(x[cut]))
            model.update(gradient)
            yield


def seconds(comm: MPI.Intracomm, steps: Iterator[object], n: int) -> float:
    """Return how long a step takes, in the mean of `n`."""
    comm.Barrier()
    begun = time.perf_counter()
    for _ in islice(steps, n):
        pass
    return (time.perf_counter() - begun) / n


def measure(job: he.Job, comm: MPI.Intracomm, model: Softmax, shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Return the seconds of a step in each loop on the slowest rank, in each round."""
    classes, batch, n = shape
    images, labels = pictures(SAMPLES, classes)
    others = {
        "by hand": by_hand(comm, Softmax(classes), images, labels, batch, EPOCHS),
        "alone": alone(job, Softmax(classes), images, labels, batch),
    }
    took: dict[str, list[float]] = {"elastic": [], **{name: [] for name in others}}
    begun = 0.0
    for step in job.steps(Samples(images, labels), EPOCHS, batch):
        if step.number % n == 0:
            if step.number:
                took["elastic"].append((time.perf_counter() - begun) / n)
            if len(took["elastic"]) == WARM + ROUNDS:
                break
            for name, steps in others.items():
                took[name].append(seconds(comm, steps, n))
            comm.Barrier()
            begun = time.perf_counter()
        for micro in step.microbatches():
            step.add(model.gradient(micro["image"], micro["label"], len(micro)))
        model.update(step.reduce())
    slowest = np.array(list(took.values()))
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    return dict(zip(took, slowest[:, WARM:].tolist(), strict=True))


def memory(comm: MPI.Intracomm) -> list[float]:
    """Return the bytes a second that the ranks move when all add up arrays at once."""
    a, b, c = (np.ones(MEMORY_BYTES // 4, np.float32) for _ in range(3))
    rates = np.empty(ROUNDS)
    for turn in range(ROUNDS):
        comm.Barrier()
        begun = time.perf_counter()
        np.add(a, b, out=c)
        rates[turn] = 3 * MEMORY_BYTES * comm.size / (time.perf_counter() - begun)
    comm.Allreduce(MPI.IN_PLACE, rates, MPI.MIN)
    return rates.tolist()


def train(job: he.Job) -> None:
    """Measure each shape in a loop of its own."""
    comm = MPI.COMM_WORLD.Dup()  # `job.comm` notes the user's calls, which costs some
    models = [Softmax(classes) for classes, _, _ in SHAPES]
    for number, model in enumerate(models):
        job.register(**{f"weights{number}": model.weights})
    found = [measure(job, comm, model, shape) for model, shape in zip(models, SHAPES, strict=True)]
    rates = memory(comm)
    comm.Free()
    if job.leads:
        part = FILE.with_suffix(".part")
        part.write_text(json.dumps({"seconds": found, "memory": rates}))
        part.replace(FILE)


if __name__ == "__main__":
    he.run(train)
