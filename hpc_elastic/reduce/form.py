"""How arrays lie in one stretch of memory: a flat buffer for each dtype, one behind the other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Array
from ..comm.segments import Bytes, Segment
from .half import load

ALIGN_BYTES = 64
DType = np.dtype[Any]
Shaped = tuple[tuple[int, ...], DType]


class Slot(NamedTuple):
    """Memory for one set of values.

    Attributes
    ----------
    offset : int
        Where it begins in its segment.
    memory : numpy.ndarray, uint8, or CuPy's
        All of it.
    flat : dict of dtype to numpy.ndarray
        The buffer of each dtype.
    arrays : list of numpy.ndarray
        Each array in its place of them.
    results : list of numpy.ndarray
        These, read-only on the host: other ranks may read the same memory.
    """

    offset: int
    memory: Bytes
    flat: dict[DType, Array]
    arrays: list[Array]
    results: list[Array]


class Form:
    """Where each of `arrays`, given by shape and dtype, lies.

    Parameters
    ----------
    arrays : sequence of (shape, dtype)
        As what they are added up.
    digest : int
        See below.
    given : sequence of (shape, dtype), optional
        As what the results are to be had, where that is wider.

    Attributes
    ----------
    nbytes : int
        Length of the whole.
    digest : int
        As given: different for most forms that differ, and the same on all ranks.
    """

    def __init__(self, arrays: Sequence[Shaped], digest: int, given: Sequence[Shaped] | None = None) -> None:
        self.digest = digest
        self._given = arrays if given is None else given
        self._places: list[tuple[DType, slice, tuple[int, ...]]] = []
        lengths: dict[DType, int] = {}
        for shape, dtype in arrays:
            start = lengths.get(dtype, 0)
            lengths[dtype] = start + math.prod(shape)
            self._places.append((dtype, slice(start, lengths[dtype]), shape))
        self._cuts: list[tuple[DType, slice]] = []
        self.nbytes = 0
        for dtype, length in lengths.items():
            stop = self.nbytes + length * dtype.itemsize
            self._cuts.append((dtype, slice(self.nbytes, stop)))
            self.nbytes = -(-stop // ALIGN_BYTES) * ALIGN_BYTES

    @cached_property
    def _wide(self) -> dict[int, Array]:
        """Arrays of this process for results of which the sums are narrower, by their numbers."""
        pairs = enumerate(zip(self._given, self._places, strict=False))
        return {number: np.empty(shape, dtype) for number, ((shape, dtype), (kept, *_)) in pairs if dtype != kept}

    def results(self, total: Slot) -> list[Array]:
        """Return the arrays in `total`, read-only on the host, each with the dtype that it was given with."""
        if not self._wide:
            return total.results
        found = list(total.results)
        for number, wide in self._wide.items():
            load(total.arrays[number], wide)
            found[number] = _read_only(wide)
        return found

    def new(self) -> Slot:
        """Return memory of this process alone."""
        return self.slot(np.empty(self.nbytes, np.uint8))

    def slot(self, memory: Bytes, offset: int = 0) -> Slot:
        """Return the `nbytes` bytes of `memory` from `offset` on."""
        whole = memory[offset : offset + self.nbytes]
        flat: dict[DType, Array] = {dtype: whole[cut].view(dtype) for dtype, cut in self._cuts}
        arrays = [flat[dtype][place].reshape(shape) for dtype, place, shape in self._places]
        results = [_read_only(array) for array in arrays] if isinstance(whole, np.ndarray) else arrays
        return Slot(offset, whole, flat, arrays, results)


def _read_only(array: NDArray[Any]) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


class Slots(ABC):
    """Slots of one form, which are taken, given back, and used again."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._result: Slot | None = None
        self._given_up: list[Slot] = []

    def take(self) -> Slot:
        """Return a slot that nobody uses."""
        if self._free:
            return self._free.pop()
        self._slots.append(self._made(len(self._slots) * max(self.form.nbytes, ALIGN_BYTES)))
        return self._slots[-1]

    def give(self, slots: Iterable[Slot]) -> None:
        """Take slots back."""
        self._free += slots

    def recall(self, spared: Iterable[Slot]) -> None:
        """Take all slots back, wherever they are, but those `spared`."""
        kept = {slot.offset for slot in (*spared, *self._given_up, self._result) if slot is not None}
        self._free = [slot for slot in self._slots if slot.offset not in kept]

    def result(self) -> Slot:
        """Return the one slot for results that others read."""
        if self._result is None:
            self._result = self.take()
        return self._result

    @cached_property
    def own(self) -> Slot:
        """One that nobody else sees, for results."""
        return self.form.new()

    def give_result_up(self) -> None:
        """Have another slot for results: the messages of a lost rank's may still come into this one."""
        if self._result is not None:
            self._given_up.append(self._result)
            self._result = None

    @abstractmethod
    def _made(self, offset: int) -> Slot:
        """Return a new slot, which begins at `offset`."""


class Pool(Slots):
    """Slots in a segment that other ranks of this host can map.

    Attributes
    ----------
    segment : Segment
        Where they are.
    """

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.segment = Segment()

    def _made(self, offset: int) -> Slot:
        self.segment.grow(offset + max(self.form.nbytes, ALIGN_BYTES))
        return self.form.slot(self.segment.bytes, offset)
