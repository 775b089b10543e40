"""Distributed arrays: every rank holds a block of rows, and a resize moves as few of them as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import ArrayError
from .model import Move
from .partition import Layout, moves, relayout

Array = NDArray[Any]


class Ranks(Protocol):
    """The ranks among which rows move."""

    rank: int
    size: int

    def exchange(self, sends: list[tuple[Move, Array]], receives: list[tuple[Move, Array]]) -> None: ...


class Form(msgspec.Struct, frozen=True):
    """What a newcomer must know of an array: its global shape, dtype, and who holds which block."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    owners: tuple[int, ...]


class DistributedArray:
    """An array whose first axis is cut into one contiguous block of rows a rank. Made by `Job.array`.

    Attributes
    ----------
    shape : tuple of int
        Global shape.
    dtype : numpy.dtype
        Element type.
    local : numpy.ndarray
        This rank's rows, ``[start:stop]`` of the whole. A resize replaces it: read it anew at every turn of the loop.
        In a newcomer that has not joined yet it has no rows.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: DTypeLike, ranks: Callable[[], Ranks | None]) -> None:
        if len(shape) == 0 or any(n < 0 for n in shape):
            raise ArrayError(f"array {name!r}: the shape {tuple(shape)} must have at least one axis and no negative length")
        self.name = name
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        if self.dtype.hasobject:
            raise ArrayError(f"array {name!r}: dtype {self.dtype} holds Python objects, which can't be moved between ranks")
        self._ranks = ranks
        here = ranks()
        self.layout = Layout(self.shape[0], tuple(range(here.size))) if here else Layout(0, (0,))
        self._rank = here.rank if here else 0
        self._local: Array = np.zeros((self.stop - self.start, *self.shape[1:]), self.dtype)

    @property
    def local(self) -> Array:
        """Rows of this rank; what is assigned must have their shape and dtype."""
        return self._local

    @local.setter
    def local(self, rows: Array) -> None:
        if rows.shape != self._local.shape or rows.dtype != self.dtype:
            raise ArrayError(
                f"array {self.name!r}: this rank's rows are {self._local.shape} {self.dtype}, not {rows.shape} {rows.dtype}"
            )
        self._local = rows

    @property
    def start(self) -> int:
        """Global number of the first local row."""
        return self.layout.range_of(self._rank)[0]

    @property
    def stop(self) -> int:
        """Global number after the last local row."""
        return self.layout.range_of(self._rank)[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(self.dtype.itemsize * np.prod(self.shape[1:], dtype=np.int64))

    def form(self) -> Form:
        """Return what a newcomer must know."""
        return Form(self.name, self.shape, self.dtype.str, self.layout.owners)

    def _joined(self) -> Ranks:
        here = self._ranks()
        if here is None:
            raise ArrayError(f"array {self.name!r}: this rank has not joined the job yet; use the array inside the loop")
        if self.layout.rows != self.shape[0] or len(self.layout.owners) != here.size:
            raise ArrayError(f"array {self.name!r} does not belong to this generation")
        return here

    def halo(self, width: int = 1) -> tuple[Array, Array]:
        """Return copies of the `width` rows before and after the local ones. Collective.

        Returns
        -------
        before, after : numpy.ndarray
            Up to `width` rows each, fewer at the ends of the array, and none on a rank without rows.

        Raises
        ------
        ArrayError
            If `width` is negative, or this rank has not joined yet.
        """
        if width < 0:
            raise ArrayError(f"array {self.name!r}: a halo of {width} rows")
        here = self._joined()
        before = self._empty(max(0, self.start - width), self.start) if len(self.local) else self._empty(0, 0)
        after = self._empty(self.stop, min(self.shape[0], self.stop + width)) if len(self.local) else self._empty(0, 0)
        receives, sends = [], []
        for move in halo_moves(self.layout, width):
            if move.target == self._rank:
                part = (
                    before[move.start - self.start + len(before) :]
                    if move.stop <= self.start
                    else after[move.start - self.stop :]
                )
                receives.append((move, part[: move.stop - move.start]))
            if move.source == self._rank:
                sends.append((move, np.ascontiguousarray(self.local[move.start - self.start : move.stop - self.start])))
        here.exchange(sends, receives)
        return before, after

    def gather(self, root: int = 0) -> Array | None:
        """Return the whole array on rank `root` and None on the others. Collective.

        Raises
        ------
        ArrayError
            If there is no rank `root`, or this rank has not joined yet.
        """
        here = self._joined()
        if not 0 <= root < here.size:
            raise ArrayError(f"array {self.name!r}: there is no rank {root} to gather on, only 0 to {here.size - 1}")
        whole = self._empty(0, self.shape[0]) if here.rank == root else None
        receives, sends = [], []
        for rank in range(here.size):
            start, stop = self.layout.range_of(rank)
            move = Move(rank, root, start, stop)
            if rank == root == here.rank and whole is not None:
                whole[start:stop] = self.local
            elif rank == here.rank and stop > start:
                sends.append((move, np.ascontiguousarray(self.local)))
            elif whole is not None and stop > start:
                receives.append((move, whole[start:stop]))
        here.exchange(sends, receives)
        return whole

    def _empty(self, start: int, stop: int) -> Array:
        return np.empty((stop - start, *self.shape[1:]), self.dtype)

    def adopt(self, form: Form, rank: int) -> None:
        """Take over, in a newcomer, the form that the members know; it holds no rows yet. `rank` is in the merged world."""
        if (form.shape, form.dtype) != (self.shape, self.dtype.str):
            raise ArrayError(
                f"array {self.name!r} is {self.shape} {self.dtype} here, but {form.shape} {form.dtype} on the members: "
                "newcomers must make the same arrays"
            )
        self.layout = Layout(form.shape[0], form.owners)
        self._rank = rank

    def saved(self) -> tuple[Array, Layout, int]:
        """Return what `restore` takes to undo a resize; `redistribute` makes new arrays, so that this costs nothing."""
        return self._local, self.layout, self._rank

    def restore(self, saved: tuple[Array, Layout, int]) -> None:
        """Be again as when `saved` was called."""
        self._local, self.layout, self._rank = saved

    def redistribute(self, ranks: Ranks, kept: Sequence[int]) -> int:
        """Move rows so that the ranks `kept` of `ranks` hold all of them; return the bytes that moved. Collective.

        `ranks` are the members before the change followed by the newcomers. Newcomers have called `adopt`.
        """
        old, before = self.layout, len(self.layout.owners)
        carried = {rank: new for new, rank in enumerate(kept) if rank < before}
        new = relayout(old, len(kept), carried)
        plan = [Move(m.source, kept[m.target], m.start, m.stop) for m in moves(old, new, carried)]
        first = old.range_of(self._rank)[0] if self._rank < before else 0
        stays = self._rank in kept
        start, stop = new.range_of(kept.index(self._rank)) if stays else (0, 0)
        local = self._empty(start, stop)
        low, high = max(first, start), min(first + len(self.local), stop)
        if low < high:
            local[low - start : high - start] = self.local[low - first : high - first]
        sends = [
            (m, np.ascontiguousarray(self.local[m.start - first : m.stop - first])) for m in plan if m.source == self._rank
        ]
        receives = [(m, local[m.start - start : m.stop - start]) for m in plan if m.target == self._rank]
        ranks.exchange(sends, receives)
        self._local, self.layout = local, new
        if stays:
            self._rank = kept.index(self._rank)
        return sum(m.stop - m.start for m in plan) * self.row_bytes


def halo_moves(layout: Layout, width: int) -> list[Move]:
    """Return what every rank needs of the others for halos of `width` rows; pure, the same on all ranks."""
    found = []
    ranges = [layout.range_of(rank) for rank in range(len(layout.owners))]
    for target, (start, stop) in enumerate(ranges):
        if start == stop:
            continue
        for low, high in ((max(0, start - width), start), (stop, min(layout.rows, stop + width))):
            for source, (first, last) in enumerate(ranges):
                if source != target and max(low, first) < min(high, last):
                    found.append(Move(source, target, max(low, first), min(high, last)))
    return found
