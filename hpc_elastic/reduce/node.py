"""The sum over ranks of one host: each reads what the others have, where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from ..comm.board import Board
from ..comm.segments import Bytes, Segment
from ..errors import ArrayError
from ..partition import block
from .adding import add_up
from .form import ALIGN_BYTES, Form, Pool, Slot, Slots
from .order import There, whole_tree

HEAD = 5  # numbers that a rank tells of itself, before those of its slots

S_contra = TypeVar("S_contra", bound=Slots, contravariant=True)


class Transport(Protocol[S_contra]):
    """Adds up what all ranks have. Collective.

    `mine` are this rank's partial sums, in some of the slots of `pool`; `there` are the subtrees whose sums each rank has. A
    result is valid until the next sum.
    """

    def small(self, form: Form, pool: S_contra, mine: Sequence[Slot], there: There) -> Slot:
        """Every rank adds up all. `mine` has to stay as it is until the sum after this one has been done."""
        ...

    def large(self, form: Form, pool: S_contra, mine: Sequence[Slot], there: There) -> Slot:
        """Every rank adds up a part. Afterwards nobody reads `mine` any more."""
        ...


class Near:
    """What the ranks of this host have in their segments."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._segments: list[tuple[tuple[int, ...], Bytes]] = [((), np.empty(0, np.uint8)) for _ in board.hosts[board.host]]
        self._views: dict[tuple[int, int], Slot] = {}  # by place and offset

    def meet(self, form: Form, pool: Pool, mine: Sequence[Slot], *, large: bool) -> list[Slot]:
        """Meet the others; return where the result goes, if `large`, and the partial sums of all ranks."""
        board = self.board
        result = pool.result().offset if large and not board.place else -1
        segment = pool.segment
        head = segment.serial, segment.descriptor, len(segment.bytes), form.digest, result
        board.tell([*head, *(slot.offset for slot in mine)])
        board.meet()
        told = board.told()
        if any(numbers[3] != form.digest for numbers in told):
            raise ArrayError("the ranks did not give arrays alike: shapes and dtypes must be the same on all of them")
        if any(tuple(numbers[:3]) != self._segments[place][0] for place, numbers in enumerate(told)):
            self._map(segment, told)
        places = [(0, told[0][HEAD - 1])] if large else []
        places += [(place, offset) for place, numbers in enumerate(told) for offset in numbers[HEAD:]]
        for place, offset in places:
            if (place, offset) not in self._views:
                self._views[place, offset] = form.slot(self._segments[place][1], offset)
        return [self._views[key] for key in places]

    def _map(self, own: Segment, told: Sequence[Sequence[int]]) -> None:
        """Map what is new. The owners wait for that: they might end, or close a segment, right behind the sum."""
        for place, (serial, descriptor, nbytes, *_) in enumerate(told):
            key = serial, descriptor, nbytes
            if place == self.board.place or not nbytes:
                self._segments[place] = key, own.bytes if nbytes else np.empty(0, np.uint8)
            elif key != self._segments[place][0]:
                self._segments[place] = key, self.board.map(place, descriptor, nbytes, writable=not place)
        self._views.clear()
        self.board.meet()


class OneHost:
    """The transport for ranks of one host."""

    def __init__(self, board: Board) -> None:
        self._near = Near(board)
        self._place, self._ranks = board.place, len(board.hosts[0])

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        return whole_sum(there, self._near.meet(form, pool, mine, large=False), pool.own)

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        total, *parts = self._near.meet(form, pool, mine, large=True)
        tree = whole_tree(there)
        for dtype, out in total.flat.items():
            start, stop = cut(len(out), self._ranks, self._place, out.itemsize)
            if start < stop:
                add_up(tree, [part.flat[dtype][start:stop] for part in parts], out[start:stop])
        self._near.board.meet()
        return total


def whole_sum(there: There, parts: Sequence[Slot], total: Slot) -> Slot:
    """Return `total`, with the sum of all that the ranks have in it."""
    tree = whole_tree(there)
    for dtype, out in total.flat.items():
        add_up(tree, [part.flat[dtype] for part in parts], out)
    return total


def cut(length: int, parts: int, number: int, itemsize: int) -> tuple[int, int]:
    """Return part `number` of `length` elements, cut where the processor's cache lines begin."""
    line = max(1, ALIGN_BYTES // itemsize)
    start, stop = block(-(-length // line), parts, number)
    return min(length, start * line), min(length, stop * line)
