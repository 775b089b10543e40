"""Who holds which part: balanced intervals, and layouts of blocks that change with the fewest rows moved. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .model import Move

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def block(n: int, parts: int, i: int) -> tuple[int, int]:
    """Return the interval ``[start, stop)`` of part `i` when `n` items are cut into `parts` balanced ones."""
    return n * i // parts, n * (i + 1) // parts


def blocks(n: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Return all intervals of `block`."""
    return tuple(block(n, parts, i) for i in range(parts))


@dataclass(frozen=True)
class Layout:
    """How rows lie on ranks: block b of ``len(owners)`` balanced blocks is held by rank ``owners[b]``.

    Attributes
    ----------
    rows : int
        Number of rows.
    owners : tuple of int
        A permutation of the ranks.
    """

    rows: int
    owners: tuple[int, ...]

    def block_of(self, rank: int) -> int:
        """Return the number of the block that `rank` holds."""
        return self.owners.index(rank)

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the rows ``[start, stop)`` that `rank` holds."""
        return block(self.rows, len(self.owners), self.block_of(rank))

    def neighbours(self, rank: int) -> tuple[int | None, int | None]:
        """Return the ranks that hold the rows before and after those of `rank`; None where there are none.

        Ranks without rows are passed over and have no neighbours themselves, so that to be neighbours is always mutual.
        """
        cuts = blocks(self.rows, len(self.owners))
        there = [owner for owner, (start, stop) in zip(self.owners, cuts, strict=True) if start < stop]
        if rank not in there:
            return None, None
        i = there.index(rank)
        return there[i - 1] if i else None, there[i + 1] if i + 1 < len(there) else None


def relayout(old: Layout, new_size: int, carried: Mapping[int, int]) -> Layout:
    """Return the layout on `new_size` ranks into which the fewest rows have to move.

    Parameters
    ----------
    old : Layout
        Where the rows are.
    new_size : int
        Number of ranks afterwards.
    carried : mapping
        New rank of every old rank that stays.

    Notes
    -----
    The cuts between blocks are given, since blocks are balanced; what is free is who gets which block. The pairs of old
    and new blocks that overlap, in the order of their rows, form a staircase: each shares its old or its new block with
    the one before. So those that a pair excludes, because a process gets one block and a block one process, are a run
    just before it, and the heaviest set of pairs is found as weighted intervals are scheduled, in linear time. Blocks
    that nobody keeps a part of go to the ranks left over, in order. Of several best layouts it is always the same one.
    """
    pairs = [pair for pair in _overlaps(old.rows, len(old.owners), new_size) if old.owners[pair.old] in carried]
    best = [0]  # best[k]: most rows that stay, by the first k pairs
    free = []  # free[k]: how many pairs come before the run that pair k excludes
    first_of_old: dict[int, int] = {}
    first_of_new: dict[int, int] = {}
    for k, pair in enumerate(pairs):
        free.append(min(first_of_old.setdefault(pair.old, k), first_of_new.setdefault(pair.new, k)))
        best.append(max(best[k], best[free[k]] + pair.stop - pair.start))
    kept: dict[int, int] = {}
    k = len(pairs)
    while k > 0:
        if best[k] == best[k - 1]:
            k -= 1
        else:
            pair = pairs[k - 1]
            kept[pair.new] = carried[old.owners[pair.old]]
            k = free[k - 1]
    others = iter(sorted(set(range(new_size)) - set(kept.values())))
    return Layout(old.rows, tuple(kept[b] if b in kept else next(others) for b in range(new_size)))


def moves(old: Layout, new: Layout, carried: Mapping[int, int]) -> tuple[Move, ...]:
    """Return what has to move from `old` to `new`, in the order of the rows.

    Sources are old ranks, targets new ones. Rows that stay with their process, by `carried`, don't move.
    """
    return tuple(
        Move(source, target, pair.start, pair.stop)
        for pair in _overlaps(old.rows, len(old.owners), len(new.owners))
        if carried.get(source := old.owners[pair.old]) != (target := new.owners[pair.new])
    )


class _Overlap(NamedTuple):
    """The rows that an old and a new block, given by their numbers, have in common: at least one."""

    old: int
    new: int
    start: int
    stop: int


def _overlaps(rows: int, old_parts: int, new_parts: int) -> Iterator[_Overlap]:
    """Yield all overlaps of `old_parts` with `new_parts` balanced blocks, in the order of their rows."""
    old = new = start = 0
    while start < rows:
        old_stop, new_stop = block(rows, old_parts, old)[1], block(rows, new_parts, new)[1]
        stop = min(old_stop, new_stop)
        if stop > start:
            yield _Overlap(old, new, start, stop)
        start = stop
        old += old_stop == stop
        new += new_stop == stop
