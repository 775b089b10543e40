"""Who holds which part: balanced intervals, and layouts of blocks that change with the fewest rows moved. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .model import Move


def block(n: int, parts: int, i: int) -> tuple[int, int]:
    """Return the interval ``[start, stop)`` of part `i` when `n` items are cut into `parts` balanced ones."""
    return n * i // parts, n * (i + 1) // parts


def blocks(n: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Return all intervals of `block`."""
    return tuple(block(n, parts, i) for i in range(parts))


@dataclass(frozen=True)
class Layout:
    """How rows lie on ranks: block b of ``len(owners)`` balanced blocks is held by rank ``owners[b]``."""

    rows: int
    owners: tuple[int, ...]

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the rows ``[start, stop)`` that `rank` holds."""
        return block(self.rows, len(self.owners), self.owners.index(rank))


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
    The cuts between blocks are given, since blocks are balanced; what is free is who gets which block. Old and new blocks
    are sorted, disjoint intervals: if a overlaps d, no old block behind a overlaps a new one before d. So pairs that
    overlap never cross, and the heaviest matching of old with new blocks is found as a longest common subsequence is.
    """
    there = [(block(old.rows, len(old.owners), b), carried[rank]) for b, rank in enumerate(old.owners) if rank in carried]
    wanted = blocks(old.rows, new_size)
    best = [[0] * (new_size + 1) for _ in range(len(there) + 1)]
    for i in range(len(there) - 1, -1, -1):
        for j in range(new_size - 1, -1, -1):
            pair = _overlap(there[i][0], wanted[j])
            best[i][j] = max(best[i + 1][j], best[i][j + 1], pair + best[i + 1][j + 1] if pair else 0)
    owners: list[int | None] = [None] * new_size
    i = j = 0
    while i < len(there) and j < new_size:
        pair = _overlap(there[i][0], wanted[j])
        if pair and best[i][j] == pair + best[i + 1][j + 1]:
            owners[j] = there[i][1]
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    free = iter(sorted(set(range(new_size)) - {rank for rank in owners if rank is not None}))
    return Layout(old.rows, tuple(next(free) if rank is None else rank for rank in owners))


def moves(old: Layout, new: Layout, carried: Mapping[int, int]) -> tuple[Move, ...]:
    """Return what has to move from `old` to `new`; sources are old ranks, targets new ones, sorted by rows."""
    found = []
    for source in range(len(old.owners)):
        for target in range(len(new.owners)):
            first, last = old.range_of(source)
            start, stop = new.range_of(target)
            low, high = max(first, start), min(last, stop)
            if low < high and carried.get(source) != target:
                found.append(Move(source, target, low, high))
    return tuple(sorted(found, key=lambda move: move.start))


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(0, min(a[1], b[1]) - max(a[0], b[0]))
