"""How a structure of arrays lies in one stretch of memory: a flat buffer for each dtype, one behind the other."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Structure
from ..comm.segments import Segment

Array = NDArray[Any]
Values = dict[str, Array]  # by dtype
ALIGN_BYTES = 64


class Form:
    """Where each array lies; metrics lie behind the float64 ones.

    Attributes
    ----------
    lengths : dict of str to int
        Elements of each dtype.
    places : list of (str, slice, tuple of int)
        Dtype, place and shape of each array.
    nbytes : int
        Length of the whole.
    """

    def __init__(
        self, structure: Structure, arrays: tuple[tuple[tuple[int, ...], str], ...], metrics: tuple[str, ...]
    ) -> None:
        self.key = structure, arrays, metrics
        self.structure = structure
        self.metrics = metrics
        self.places: list[tuple[str, slice, tuple[int, ...]]] = []
        self.lengths: dict[str, int] = {}
        for shape, dtype in (*arrays, ((len(metrics),), np.dtype(np.float64).str)):
            start = self.lengths.get(dtype, 0)
            self.lengths[dtype] = start + math.prod(shape)
            self.places.append((dtype, slice(start, self.lengths[dtype]), shape))
        self._cuts: list[tuple[str, slice]] = []
        self.nbytes = 0
        for dtype, length in self.lengths.items():
            stop = self.nbytes + length * np.dtype(dtype).itemsize
            self._cuts.append((dtype, slice(self.nbytes, stop)))
            self.nbytes = -(-stop // ALIGN_BYTES) * ALIGN_BYTES

    def new(self) -> Values:
        """Return buffers for one set of values."""
        return self.values(np.empty(self.nbytes, np.uint8))

    def values(self, memory: NDArray[np.uint8]) -> Values:
        """Return the `nbytes` bytes of `memory` as buffers."""
        return {dtype: memory[cut].view(dtype) for dtype, cut in self._cuts}


class Slot(NamedTuple):
    """Buffers for one set of values, at `offset` in the segment."""

    offset: int
    values: Values


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

    def take(self) -> Slot:
        """Return a slot that nobody uses."""
        return self._free.pop() if self._free else self._new()

    def give(self, slots: list[Slot]) -> None:
        """Take slots back."""
        self._free += slots

    def recall(self, spared: list[Slot]) -> None:
        """Take all slots back, wherever they are, but those `spared`."""
        kept = {slot.offset for slot in (*spared, self._result) if slot is not None}
        self._free = [slot for slot in self._slots if slot.offset not in kept]

    def result(self) -> Slot:
        """Return the one slot for results that others read."""
        if self._result is None:
            self._result = self.take()
        return self._result

    def _new(self) -> Slot:
        nbytes = max(self._form.nbytes, ALIGN_BYTES)
        offset = len(self._slots) * nbytes
        self.segment.grow(offset + nbytes)
        slot = Slot(offset, self._form.values(self.segment.bytes[offset : offset + self._form.nbytes]))
        self._slots.append(slot)
        return slot
