"""The order of the samples: (seed, epoch, position) -> sample, a pure function, and how steps cut it up.

Nothing is kept between calls but a cache, so any process can ask for any slice at any time, and all agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

EVERYTHING, WITHIN_WINDOW, DECODING = range(3)  # keeps their random numbers apart


@dataclass(frozen=True)
class Order:
    """The order in which the samples of each epoch are consumed.

    Parameters
    ----------
    samples : int
        Size of the set.
    seed : int
        Number below 2**64 that, with the epoch, fixes the order.
    shuffle : bool
        False takes the samples as they are stored.
    chunk : int or None
        None permutes the whole set. A number permutes chunks of that many consecutive samples, then the samples within
        each window of `window` chunks that became neighbours, so that a chunk is read and decompressed once for each
        window instead of once for each sample. The last chunk of the set may be smaller.
    window : int
        Chunks in a window: what a reader keeps in memory.
    """

    samples: int
    seed: int = 0
    shuffle: bool = True
    chunk: int | None = None
    window: int = 16

    def __post_init__(self) -> None:
        if self.samples < 0 or not 0 <= self.seed < 2**64:
            raise ValueError(f"an order needs samples >= 0 and 0 <= seed < 2**64, not {self.samples} and {self.seed}")
        if self.window < 1 or (self.chunk is not None and self.chunk < 1):
            raise ValueError(f"chunk = {self.chunk} and window = {self.window} must be at least 1")

    def take(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples at the positions [start, stop) of `epoch`, shape [stop - start], dtype int64.

        Raises
        ------
        ValueError
            If the positions are not within [0, samples], or the epoch is negative.
        """
        if epoch < 0 or not 0 <= start <= stop <= self.samples:
            raise ValueError(f"no positions [{start}, {stop}) in epoch {epoch} of {self.samples} samples")
        if not self.shuffle or start == stop:
            return np.arange(start, stop, dtype=np.int64)
        if self.chunk is None:
            return _permutation(self.samples, self.seed, epoch, EVERYTHING, 0)[start:stop].copy()
        # Positions at which the windows start; only the window with the set's last chunk can be of another length.
        starts = _window_starts(self, epoch)
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        span = [_window(self, epoch, w) for w in range(first, last + 1)]
        begin = int(starts[first])
        return np.concatenate(span)[start - begin : stop - begin]


# Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). Its raw
# output is fixed by the paper, while NumPy may change from version to version what Generator.permutation makes of it.
@lru_cache(maxsize=4)  # of whole sets and lists of chunks: two epochs where one ends and the next begins
def _permutation(n: int, seed: int, epoch: int, purpose: int, number: int) -> NDArray[np.int64]:
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, purpose, number, 0], dtype=np.uint64)  # the lowest word counts within the stream
    order = stable_order(np.random.Philox(key=key, counter=counter).random_raw(n))
    order.flags.writeable = False
    return order


def stable_order(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the indices that sort `keys`, those of equal ones in their order."""
    # Numbers are sorted eight times as fast as indices are. So each key's index takes the place of its low bits; that is the
    # same order unless two keys have the same high bits, which of a million random ones happens once in 30 times.
    low = np.uint64(max(1, (len(keys) - 1).bit_length()))
    mixed = keys >> low << low | np.arange(len(keys), dtype=np.uint64)
    mixed.sort()
    high = mixed >> low
    if (high[1:] == high[:-1]).any():
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    return (mixed & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)


def _chunks(order: Order, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first sample of each chunk, in the order of this epoch, and the chunks' lengths."""
    chunk = order.chunk or 1
    firsts = chunk * _permutation(-(-order.samples // chunk), order.seed, epoch, EVERYTHING, 0)
    return firsts, np.minimum(chunk, order.samples - firsts)


@lru_cache(maxsize=2)
def _window_starts(order: Order, epoch: int) -> NDArray[np.int64]:
    _, lengths = _chunks(order, epoch)
    ends = np.add.accumulate(np.add.reduceat(lengths, np.arange(0, len(lengths), order.window)))
    return np.concatenate(([0], ends[:-1]))


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> NDArray[np.int64]:
    firsts, lengths = (part[window * order.window : (window + 1) * order.window] for part in _chunks(order, epoch))
    samples = np.concatenate([np.arange(a, a + n) for a, n in zip(firsts, lengths, strict=True)])
    # Not through the cache, in which windows would push out the list of chunks.
    shuffled = samples[_permutation.__wrapped__(len(samples), order.seed, epoch, WITHIN_WINDOW, window)]
    shuffled.flags.writeable = False
    return shuffled


def random_of(seed: int, step: int, microbatch: int) -> np.random.Generator:
    """Return the random numbers for the samples of a microbatch, the same on whatever rank it is."""
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, DECODING, microbatch, 0], dtype=np.uint64)))


def steps_per_epoch(samples: int, batch: int) -> int:
    """Return the number of steps in an epoch; its last batch may be smaller, and nothing is dropped or repeated."""
    return -(-samples // batch)


@lru_cache(maxsize=8)  # batches are of one size, but for the last of an epoch
def microbatches(size: int, n: int) -> tuple[tuple[int, int], ...]:
    """Return the `n` microbatches [start, stop) of `size` samples: as even as can be, some empty if there are few."""
    return tuple((size * i // n, size * (i + 1) // n) for i in range(n))


@lru_cache(maxsize=8)
def without_samples(size: int, n: int) -> frozenset[int]:
    """Return the numbers of those of the `microbatches` that are empty."""
    return frozenset(i for i, (start, stop) in enumerate(microbatches(size, n)) if start == stop)
