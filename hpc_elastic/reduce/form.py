"""How a structure of arrays lies in one stretch of memory: a flat buffer for each dtype, one behind the other."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Array, Structure, name_of
from ..comm.segments import Bytes, Segment
from .half import kept_as, load

ALIGN_BYTES = 64
DType = np.dtype[Any]


class Slot(NamedTuple):
    """Memory for one set of values.

    Attributes
    ----------
    offset : int
        Where it begins in its segment.
    flat : dict of dtype to numpy.ndarray
        The buffer of each dtype.
    arrays : list of numpy.ndarray
        Each array, and the metrics, in its place of them.
    results : list of numpy.ndarray
        These, read-only: other ranks may read the same memory.
    """

    offset: int
    flat: dict[DType, Array]
    arrays: list[Array]
    results: list[Array]


class Form:
    """Where each array lies; metrics lie behind the float64 ones.

    Parameters
    ----------
    structure, arrays, metrics
        How arrays are nested, shape and dtype of each, and names.
    wire : numpy.dtype, optional
        As what wider floating-point values are added up.

    Attributes
    ----------
    nbytes : int
        Length of the whole.
    digest : int
        Different for most forms that differ; the same in all processes.
    """

    def __init__(
        self,
        structure: Structure,
        arrays: tuple[tuple[tuple[int, ...], DType], ...],
        metrics: tuple[str, ...],
        wire: DType | None = None,
    ) -> None:
        self.key = structure, arrays, metrics
        self.structure = structure
        self.metrics = metrics
        told = [*((shape, name_of(dtype)) for shape, dtype in arrays), *metrics, wire]
        self.digest = zlib.crc32(repr(told).encode())
        self._places: list[tuple[DType, slice, tuple[int, ...]]] = []
        lengths: dict[DType, int] = {}
        kept = [(shape, kept_as(dtype, wire)) for shape, dtype in arrays]
        for shape, dtype in (*kept, ((len(metrics),), np.dtype(np.float64))):
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
    def _wide(self) -> list[Array | None]:
        """Arrays of this process for results of which the sums are narrower."""
        kept = [dtype for dtype, _, _ in self._places]
        return [
            np.empty(shape, dtype) if dtype != own else None
            for (shape, dtype), own in zip(self.key[1], kept[:-1], strict=True)
        ]

    def results(self, total: Slot) -> list[Array]:
        """Return the arrays in `total` and the metrics, read-only, each with the dtype that it was given with."""
        found = list(total.results)
        for number, wide in enumerate(self._wide):
            if wide is not None:
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
        return Slot(offset, flat, arrays, [_read_only(array) for array in arrays])


def _read_only(array: NDArray[Any]) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


class Pool:
    """Slots of one form, in a segment that other ranks of this host can map.

    Attributes
    ----------
    segment : Segment
        Where they are.
    """

    def __init__(self, form: Form) -> None:
        self.segment = Segment()
        self._form = form
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._result: Slot | None = None
        self._given_up: list[Slot] = []

    @cached_property
    def own(self) -> Slot:
        """One that nobody else sees, for results."""
        return self._form.new()

    def take(self) -> Slot:
        """Return a slot that nobody uses."""
        return self._free.pop() if self._free else self._new()

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

    def give_result_up(self) -> None:
        """Have another slot for results: the messages of a lost rank's may still come into this one."""
        if self._result is not None:
            self._given_up.append(self._result)
            self._result = None

    def _new(self) -> Slot:
        nbytes = max(self._form.nbytes, ALIGN_BYTES)
        offset = len(self._slots) * nbytes
        self.segment.grow(offset + nbytes)
        self._slots.append(self._form.slot(self.segment.bytes, offset))
        return self._slots[-1]
