"""The sum over ranks of one host: each reads what the others have, where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..comm.board import Board
from ..comm.segments import Segment, mapped
from ..partition import block
from .adding import add_up
from .form import ALIGN_BYTES, Form, Pool, Slot, Values
from .order import There, whole_tree

Bytes = NDArray[np.uint8]
HEAD = 4  # numbers that a rank tells of itself, before those of its slots


class Transport(Protocol):
    """Adds up what all ranks have. Collective.

    `mine` are this rank's partial sums, `there` the subtrees whose sums each rank has. A result is valid until the next sum.
    """

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Values:
        """Every rank adds up all. `mine` has to stay as it is until the sum after this one has been done."""
        ...

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Values:
        """Every rank adds up a part. Afterwards nobody reads `mine` any more."""
        ...


class Near:
    """What the ranks of this host have in their segments."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._segments: list[tuple[tuple[int, ...], Bytes]] = [((), np.empty(0, np.uint8)) for _ in board.pids]
        self._views: dict[tuple[int, int], Values] = {}  # by place and offset

    def meet(self, form: Form, pool: Pool, mine: Sequence[Slot], *, large: bool) -> tuple[list[Values], Values]:
        """Meet the others; return the partial sums of all, in the order of the ranks, and where the result goes."""
        board = self.board
        result = pool.result().offset if large and not board.place else -1
        segment = pool.segment
        board.tell([segment.serial, segment.descriptor, len(segment.bytes), result, *(slot.offset for slot in mine)])
        board.meet()
        told = board.told()
        if any(tuple(numbers[:3]) != self._segments[place][0] for place, numbers in enumerate(told)):
            self._map(segment, told)
        parts = [self._values(form, place, offset) for place, numbers in enumerate(told) for offset in numbers[HEAD:]]
        return parts, self._values(form, 0, told[0][3]) if large else {}

    def _values(self, form: Form, place: int, offset: int) -> Values:
        key = place, offset
        if key not in self._views:
            self._views[key] = form.values(self._segments[place][1][offset : offset + form.nbytes])
        return self._views[key]

    def _map(self, own: Segment, told: Sequence[Sequence[int]]) -> None:
        """Map what is new. The owners wait for that: they might end, or close a segment, right behind the sum."""
        for place, (serial, descriptor, nbytes, *_) in enumerate(told):
            key = serial, descriptor, nbytes
            if place == self.board.place or not nbytes:
                self._segments[place] = key, own.bytes if nbytes else np.empty(0, np.uint8)
            elif key != self._segments[place][0]:
                pid = self.board.pids[place]
                self._segments[place] = key, mapped(pid, descriptor, nbytes, writable=not place)
        self._views.clear()
        self.board.meet()


class OneHost:
    """The transport for ranks of one host."""

    def __init__(self, board: Board) -> None:
        self._near = Near(board)
        self._place, self._ranks = board.place, len(board.pids)

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Values:
        parts, _ = self._near.meet(form, pool, mine, large=False)
        tree, total = whole_tree(there), form.new()
        for dtype, out in total.items():
            add_up(tree, [values[dtype] for values in parts], out)
        return total

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Values:
        parts, total = self._near.meet(form, pool, mine, large=True)
        tree = whole_tree(there)
        for dtype, out in total.items():
            start, stop = cut(len(out), self._ranks, self._place, out.itemsize)
            if start < stop:
                add_up(tree, [values[dtype][start:stop] for values in parts], out[start:stop])
        self._near.board.meet()
        return total


def cut(length: int, parts: int, number: int, itemsize: int) -> tuple[int, int]:
    """Return part `number` of `length` elements, cut where the processor's cache lines begin."""
    line = max(1, ALIGN_BYTES // itemsize)
    start, stop = block(-(-length // line), parts, number)
    return min(length, start * line), min(length, stop * line)
