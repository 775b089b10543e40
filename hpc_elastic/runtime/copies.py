"""Copies in memory: each rank keeps the rows of the one before it in the ring, so that no rank alone holds anything.

What is lost with one rank is with its neighbour still. Where two neighbours are lost at once, the last checkpoint serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import faults
from ..checkpoint import About, Buffers
from ..model import Move

if TYPE_CHECKING:
    from ..comm.world import World
    from .reports import Here

Array = NDArray[Any]
Place = tuple[int, int, int]  # generation, loop and step: after a loss a step comes again, with other blocks


class Block(msgspec.Struct, frozen=True):
    """Rows ``[start, stop)`` of the distributed array `name`."""

    name: str
    start: int
    stop: int


class Told(msgspec.Struct, frozen=True):
    """What a newcomer that holds nothing yet must know of a place: forms of the state's arrays, and of arrays' rows."""

    about: About
    header: bytes
    state: tuple[tuple[str, tuple[int, ...]], ...]
    rows: dict[str, tuple[str, tuple[int, ...]]]


class Holding(msgspec.Struct, frozen=True):
    """What one rank holds of the state at one place: blocks of arrays, besides all that is the same on all ranks."""

    place: Place
    blocks: tuple[Block, ...]


def newest(held: Sequence[Sequence[Holding]], rows: Mapping[str, int]) -> Place | None:
    """Return the last place at which the blocks of all ranks together are whole; None if there is none.

    A rank may hold nothing of it: newcomers have nothing before the first copies that they take part in.

    Parameters
    ----------
    held : sequence of sequences of Holding
        What each rank holds.
    rows : mapping of str to int
        Rows of each array.
    """
    places = {holding.place for own in held for holding in own}
    for place in sorted(places, reverse=True):
        blocks = [block for own in held for holding in own if holding.place == place for block in holding.blocks]
        if all(_whole([b for b in blocks if b.name == name], total) for name, total in rows.items()):
            return place
    return None


def _whole(blocks: Sequence[Block], rows: int) -> bool:
    reached = 0
    for block in sorted(blocks, key=lambda block: block.start):
        if block.start > reached:
            return False
        reached = max(reached, block.stop)
    return reached >= rows


def routes(held: Sequence[Sequence[tuple[int, int]]], wanted: Sequence[tuple[int, int]]) -> list[Move]:
    """Return who sends which rows to whom, so that each rank has those it wants: its own first, then the lowest rank's.

    Parameters
    ----------
    held : sequence of sequences of (int, int)
        Rows ``[start, stop)`` that each rank holds, of one array; together they are whole.
    wanted : sequence of (int, int)
        Rows that each rank is to have.
    """
    found = []
    for target, (start, stop) in enumerate(wanted):
        sources = [target, *(rank for rank in range(len(held)) if rank != target)]
        at = start
        while at < stop:
            source, end = next((rank, last) for rank in sources for first, last in held[rank] if first <= at < last)
            if source != target:
                end = min([end, *(first for first, _ in held[target] if at < first)])  # its own rows begin there
            end = min(end, stop)
            found.append(Move(source, target, at, end))
            at = end
    return found


@dataclass
class Copy:
    """What a rank holds of one place."""

    about: About
    header: bytes
    state: list[Array]
    rows: dict[Block, Array]

    @property
    def holding(self) -> Holding:
        """What it is, for the others."""
        return Holding(self.place, tuple(self.rows))

    @property
    def place(self) -> Place:
        """Where it was taken; no two copies of a rank have the same."""
        return self.about.generation, *self.about.place

    def told(self) -> Told:
        """Return what a rank must know that has none of it."""
        rows = {block.name: (values.dtype.str, values.shape[1:]) for block, values in self.rows.items()}
        return Told(self.about, self.header, tuple((array.dtype.str, array.shape) for array in self.state), rows)


class Copies:
    """One rank's copies. The last is given up for the next when all ranks have that."""

    def __init__(self) -> None:
        self._held: list[Copy] = []
        self._buffers = Buffers(), Buffers()

    def drop(self) -> None:
        """Hold nothing any more: nobody else is there to outlive this rank, or it leaves."""
        self._held.clear()

    def take(self, world: World, here: Here, about: About, header: bytes, state: Sequence[Array]) -> None:
        """Copy the state and this rank's rows, and those of the rank before it. Collective."""
        if len(self._held) > 1:  # the last ones are not certain to be with all, and may be wanted: keep theirs
            self._buffers = Buffers(), Buffers()
        buffers = self._buffers[0]
        local = [array.local for array in here.arrays]
        copies = buffers.copy([*state, *local])
        own = copies[len(state) :]
        copy = Copy(about, header, copies[: len(state)], {})
        after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        sends, receives = [], []
        for array, values in zip(here.arrays, own, strict=True):
            copy.rows[Block(array.name, array.start, array.stop)] = values
            start, stop = array.layout.range_of(before)
            theirs = np.empty((stop - start, *array.shape[1:]), array.dtype)
            copy.rows[Block(array.name, start, stop)] = theirs
            if stop > start:
                receives.append((Move(before, world.rank, start, stop), theirs))
            if array.stop > array.start:
                sends.append((Move(world.rank, after, array.start, array.stop), values))
        faults.at("copy")
        world.exchange(sends, receives)
        self._held.append(copy)
        world.barrier()  # who is past it knows that all have the new one
        self._held = [copy]
        self._buffers = self._buffers[1], buffers

    def find(self, world: World) -> Remembered | None:
        """Return the newest state that the ranks hold together, or None. Collective."""
        gathered = world.gather_all(msgspec.msgpack.encode([copy.holding for copy in self._held]))
        held = [msgspec.msgpack.decode(each, type=list[Holding]) for each in gathered]
        known = world.gather_all(msgspec.msgpack.encode([copy.about.notes["rows"] for copy in self._held]))
        rows = {name: n for each in known for one in msgspec.msgpack.decode(each) for name, n in one.items()}
        place = newest(held, rows)
        if place is None:
            return None
        mine = next((copy for copy in self._held if copy.place == place), None)
        blocks = [next((holding.blocks for holding in own if holding.place == place), None) for own in held]
        knows = next(rank for rank, own in enumerate(blocks) if own is not None)
        told = mine.told() if mine is not None else None
        if None in blocks:
            said = msgspec.msgpack.encode(told) if told is not None and world.rank == knows else None
            told = msgspec.msgpack.decode(world.tell(said, knows), type=Told)
            mine = mine or Copy(told.about, told.header, [np.empty(shape, dtype) for dtype, shape in told.state], {})
            for array in mine.state:
                if array.nbytes:
                    world.fill(array.reshape(-1), knows)
        assert mine is not None
        assert told is not None
        return Remembered(mine, told, [own or () for own in blocks], world)


class Remembered:
    """A state in the ranks' memory, which a loop begins with as with a checkpoint. Its rows are read by all together."""

    def __init__(self, copy: Copy, told: Told, blocks: Sequence[Sequence[Block]], world: World) -> None:
        self.about = copy.about
        self.header = copy.header
        self.path = "memory"
        self._copy = copy
        self._forms = told.rows
        self._blocks = blocks
        self._world = world

    def arrays(self) -> list[Array]:
        """Return the arrays of the registered state."""
        return self._copy.state

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Return rows of the distributed array `name`. Collective."""
        world = self._world
        told = world.gather_all(msgspec.msgpack.encode((start, stop)))
        wanted = [msgspec.msgpack.decode(each, type=tuple[int, int]) for each in told]
        held = [[(block.start, block.stop) for block in blocks if block.name == name] for blocks in self._blocks]
        mine = {block: values for block, values in self._copy.rows.items() if block.name == name}
        dtype, shape = self._forms[name]
        out = np.empty((stop - start, *shape), dtype)
        sends, receives = [], []
        for move in routes(held, wanted):
            if world.rank == move.source:
                block, values = next((b, v) for b, v in mine.items() if b.start <= move.start and move.stop <= b.stop)
                part = np.ascontiguousarray(values[move.start - block.start : move.stop - block.start])
                if move.target == world.rank:
                    out[move.start - start : move.stop - start] = part
                else:
                    sends.append((move, part))
            elif world.rank == move.target:
                receives.append((move, out[move.start - start : move.stop - start]))
        world.exchange(sends, receives)
        return out
