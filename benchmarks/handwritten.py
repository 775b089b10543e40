"""Training on several ranks as one writes it by hand with mpi4py and NumPy: what an elastic job is measured against.

    mpiexec -n 2 python -m benchmarks.handwritten

Every rank draws the same permutation, takes its own share of each batch, computes the gradient of that, adds the gradients
of all ranks up by MPI_Allreduce, and updates its copy of the weights. It can't change its size, and it ends with any rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

PIXELS = 28 * 28
RATE = np.float32(0.05)

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Softmax:
    """Softmax regression of images to `classes` classes.

    Attributes
    ----------
    weights : numpy.ndarray, float32 ``[784, classes]``
    """

    def __init__(self, classes: int) -> None:
        self.weights = np.zeros((PIXELS, classes), np.float32)
        self._change = np.empty_like(self.weights)

    def gradient(self, images: Images, labels: Labels, samples: int) -> Floats:
        """Return the gradient of the sum of the losses of some images, divided by a number of `samples`."""
        x = images.astype(np.float32)
        x *= np.float32(1 / 255)
        p = x @ self.weights
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(p)), labels] -= 1
        p *= np.float32(1 / samples)
        return x.T @ p

    def update(self, gradient: Floats) -> None:
        """Go a step down along `gradient`."""
        np.multiply(gradient, RATE, out=self._change)
        self.weights -= self._change


def pictures(n: int, classes: int) -> tuple[Images, Labels]:
    """Return `n` random images, which have a bright row where their label says, and the labels, of which a quarter is wrong.

    With labels that are all right, losses and gradients would come so near to 0 that the processor is slow with them.
    """
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 64, (n, PIXELS), np.uint8), rng.integers(0, classes, n)
    images.reshape(n, 28, 28)[np.arange(n), labels % 28] += 128
    wrong = rng.random(n) < 1 / 4
    return images, np.where(wrong, rng.integers(0, classes, n), labels)


def train(comm: MPI.Intracomm, model: Softmax, images: Images, labels: Labels, batch: int, epochs: int) -> Iterator[int]:
    """Train `model` on the ranks of `comm`; yield the epoch after every step."""
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch)).permutation(len(images))
        for start in range(0, len(order), batch):
            samples = order[start : start + batch]
            n = len(samples)
            mine = samples[n * comm.rank // comm.size : n * (comm.rank + 1) // comm.size]
            gradient = model.gradient(images[mine], labels[mine], n)
            comm.Allreduce(MPI.IN_PLACE, gradient)
            model.update(gradient)
            yield epoch


def main() -> None:
    """Train for some epochs, and print how many images are told rightly."""
    images, labels = pictures(8192, 8)
    model = Softmax(8)
    for _ in train(MPI.COMM_WORLD, model, images, labels, 256, epochs=10):
        pass
    if MPI.COMM_WORLD.rank == 0:
        right = (images.astype(np.float32) @ model.weights).argmax(axis=1) == labels
        print(f"accuracy {right.mean():.4f}")


if __name__ == "__main__":
    main()
