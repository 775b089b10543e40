"""What a rank computes its part of a step from: gathered and decoded, where that takes long, while the step before runs."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Array, held
from ..errors import StepError
from ..sampler import random_of

if TYPE_CHECKING:
    from ..sampler import Order

Fields = Mapping[str, Array]
Decode = Callable[[dict[str, Array], np.random.Generator], Fields]

WORTH_S = 5e-4  # what takes less is done when it is needed: handing it to a thread and back costs a tenth of this

KEPT = 3  # batches: one that is computed from, one that comes, and one that the last step's variables still hold


def _on_pages(array: Array) -> Array:
    """Return a copy of an array that begins with a page, so that TensorFlow can compute from it where it lies."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    copy: Array = np.ndarray(array.shape, array.dtype, mmap.mmap(-1, array.nbytes, private))
    copy[...] = array
    return copy


class Samples(Protocol):
    """A data set: `len` samples, of which any can be gathered; `chunk_samples` run together where it is not None.

    What `gather` has returned must stay as it is: steps compute from it where it lies.
    With the attribute ``reads_ahead = True``, `gather` is also called in a thread, and with the arrays to fill, `out`: those
    that it returned before, which are the job's from then on. A method ``share_chunks(key)`` is called with a key that the
    ranks of a job have in common.
    """

    chunk_samples: int | None

    def __len__(self) -> int: ...

    def gather(self, samples: NDArray[np.int64]) -> dict[str, Array]: ...


class Microbatch:
    """Some samples of a step; ``micro["image"]`` is a field, ``images, labels = micro`` are the fields in their order.

    Attributes
    ----------
    index : int
        Number of the microbatch in the step.
    samples : numpy.ndarray, int64 ``[n]``
        Numbers of the samples in the data set.
    """

    def __init__(self, index: int, samples: NDArray[np.int64], fields: Fields) -> None:
        self.index = index
        self.samples = samples
        self._fields = fields

    def __getitem__(self, name: str) -> Array:
        return self._fields[name]

    def __iter__(self) -> Iterator[Array]:
        return iter(self._fields.values())

    def __len__(self) -> int:
        return len(self.samples)


class Share(NamedTuple):
    """What one rank has of a step: positions in the order of an epoch from `first` on, cut into microbatches.

    Attributes
    ----------
    epoch, step : int
        Which step; it is counted over all epochs.
    cuts : tuple of (int, int, int)
        Number of each microbatch that has samples, and where it begins and ends, from `first` on. One follows the other.
    """

    epoch: int
    step: int
    first: int
    cuts: tuple[tuple[int, int, int], ...]


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "hpc_elastic-batches")


class Batches:
    """The microbatches of one rank, from `data` in an `order`.

    Parameters
    ----------
    data : Samples
        The data set.
    order : Order
        The order of the samples in each epoch.
    decode : callable, optional
        What the user makes of the fields of each microbatch.
    """

    def __init__(self, data: Samples, order: Order, decode: Decode | None = None) -> None:
        self._data, self._order, self._decode = data, order, decode
        self._threads = _one_thread() if getattr(data, "reads_ahead", False) else None
        self._batches: list[dict[str, Array]] = []  # which are filled again when nobody holds them any more
        self._ahead: tuple[Share, Future[list[Microbatch]]] | None = None
        self._took_s = 0.0
        self._over = False

    @property
    def slow(self) -> bool:
        """Whether it is worth while to `begin` ahead."""
        return self._took_s > WORTH_S and self._threads is not None

    def begin(self, share: Share) -> None:
        """Begin with the microbatches of `share`, which are going to be taken next; if there can be a thread for that."""
        assert self._threads is not None
        try:
            self._ahead = share, self._threads.submit(self._make, share)
        except RuntimeError:  # as many as the user may have
            self._threads.shutdown(cancel_futures=True)  # it has kept what it was given
            self._threads = _one_thread()

    def take(self, share: Share) -> list[Microbatch]:
        """Return the microbatches of `share`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._make(share)
        if ahead[0] == share:
            return ahead[1].result()
        if not ahead[1].cancel():
            wait([ahead[1]])  # it fills the same arrays
        return self._make(share)

    def close(self) -> None:
        """Let go of the thread."""
        if self._threads is not None:
            self._over = True
            self._threads.shutdown(cancel_futures=True)  # waits for what is being gathered: the data may be closed next

    def _make(self, share: Share) -> list[Microbatch]:
        if not share.cuts:
            return []
        begun = time.perf_counter()
        samples = self._order.take(share.epoch, share.first, share.first + share.cuts[-1][2])
        fields = self._gather(samples)
        found = []
        for index, start, stop in share.cuts:
            if self._over:
                raise CancelledError
            cut = slice(start, stop)
            found.append(
                Microbatch(index, samples[cut], self._decoded(share.step, index, {n: f[cut] for n, f in fields.items()}))
            )
        self._took_s = time.perf_counter() - begun
        return found

    def _gather(self, samples: NDArray[np.int64]) -> Fields:
        if self._threads is None:
            return self._data.gather(samples)
        n = len(samples)
        for batch in self._batches:
            if not held(batch.values()) and all(len(array) >= n for array in batch.values()):
                return self._data.gather(samples, batch)  # type: ignore[call-arg]
        fields = self._data.gather(samples)
        if any(array.base is not None or not array.nbytes or array.dtype.hasobject for array in fields.values()):
            return fields  # parts of something else, or what can't lie there
        batch = {name: _on_pages(array) for name, array in fields.items()}
        self._batches = [*self._batches, batch][-KEPT:]
        return {name: array[:] for name, array in batch.items()}

    def _decoded(self, step: int, index: int, fields: dict[str, Array]) -> Fields:
        if self._decode is None:
            return fields
        n = len(next(iter(fields.values())))
        decoded = self._decode(fields, random_of(self._order.seed, step, index))
        if not isinstance(decoded, Mapping) or not decoded:
            raise StepError(f"decode must return a dict of arrays, not {decoded!r:.100}")
        for name, array in decoded.items():
            if not np.shape(array) or len(array) != n:
                got = f"an array {list(np.shape(array))}" if hasattr(array, "shape") else f"{array!r:.100}"
                raise StepError(f"decode must return arrays of the {n} samples that it was given, and {name!r} is {got}")
        return decoded
