"""Blocks tile and balance; a new layout moves as few rows as any choice of owners could, and the moves do what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_elastic.partition import Layout, block, blocks, moves, relayout

quick = settings(deadline=None, max_examples=60)


def lengths(intervals):
    return [stop - start for start, stop in intervals]


@st.composite
def resizes(draw, most=5):
    """A layout on `before` ranks, of any owners, and the ranks of the merged world that are kept (newcomers come last)."""
    before = draw(st.integers(1, most))
    rows = draw(st.integers(0, 40))
    owners = draw(st.permutations(range(before)))
    merged = before + draw(st.integers(0, most))
    kept = sorted(draw(st.sets(st.integers(0, merged - 1), min_size=1, max_size=most)))
    return Layout(rows, tuple(owners)), kept, merged


def carried_by(kept, before):
    return {rank: new for new, rank in enumerate(kept) if rank < before}


def holder(layout):
    """Which rank holds each row, read off the balanced blocks and nothing else."""
    found = []
    for b, rank in enumerate(layout.owners):
        found += [rank] * (layout.rows * (b + 1) // len(layout.owners) - layout.rows * b // len(layout.owners))
    return found


def rows_that_stay(old, new, carried):
    return sum(carried.get(source) == target for source, target in zip(holder(old), holder(new), strict=True))


@given(st.integers(0, 200), st.integers(1, 40))
def test_blocks_tile_and_balance(n, parts):
    intervals = blocks(n, parts)
    assert [x for start, stop in intervals for x in range(start, stop)] == list(range(n))
    assert len(intervals) == parts
    assert max(lengths(intervals)) - min(lengths(intervals)) <= 1
    assert intervals == tuple(block(n, parts, i) for i in range(parts))


@pytest.mark.parametrize(("n", "parts", "expected"), [(0, 2, [0, 0]), (2, 3, [0, 1, 1]), (7, 2, [3, 4]), (6, 3, [2, 2, 2])])
def test_blocks_by_hand(n, parts, expected):
    assert lengths(blocks(n, parts)) == expected


def test_a_rank_holds_the_block_that_it_owns():
    layout = Layout(10, (2, 0, 1))
    assert [layout.range_of(rank) for rank in range(3)] == [(3, 6), (6, 10), (0, 3)]


@quick
@given(resizes())
@example((Layout(3, (0, 1, 2, 3, 4)), [0, 2, 4, 5, 6], 7))
@example((Layout(0, (1, 0)), [1, 2], 3))
def test_as_few_rows_move_as_with_any_choice_of_owners(resize):
    old, kept, _ = resize
    carried = carried_by(kept, len(old.owners))
    new = relayout(old, len(kept), carried)
    assert new.rows == old.rows
    assert sorted(new.owners) == list(range(len(kept)))
    best = max(rows_that_stay(old, Layout(old.rows, p), carried) for p in itertools.permutations(range(len(kept))))
    moved = sum(move.stop - move.start for move in moves(old, new, carried))
    assert moved == old.rows - best


@quick
@given(st.data(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 60))
def test_ranks_may_change_their_order_too(data, before, after, rows):
    old = Layout(rows, tuple(data.draw(st.permutations(range(before)))))
    stay = data.draw(st.sets(st.integers(0, before - 1), max_size=after))
    carried = dict(zip(sorted(stay), data.draw(st.permutations(range(after))), strict=False))
    new = relayout(old, after, carried)
    assert sorted(new.owners) == list(range(after))
    best = max(rows_that_stay(old, Layout(rows, p), carried) for p in itertools.permutations(range(after)))
    assert rows_that_stay(old, new, carried) == best


@quick
@given(resizes(most=9))
def test_moves_reproduce_the_array(resize):
    old, kept, _ = resize
    carried = carried_by(kept, len(old.owners))
    new = relayout(old, len(kept), carried)
    plan = moves(old, new, carried)
    assert [move.start for move in plan] == sorted(move.start for move in plan)
    there = dict.fromkeys(range(len(kept)), frozenset())
    for rank, target in carried.items():
        there[target] |= set(range(*old.range_of(rank)))
    for move in plan:
        assert move.start < move.stop
        assert carried.get(move.source) != move.target
        rows = set(range(move.start, move.stop))
        assert rows <= set(range(*old.range_of(move.source)))
        assert rows <= set(range(*new.range_of(move.target)))
        assert not rows & there[move.target], "a row is moved to a rank that has it"
        there[move.target] |= rows
    for rank, rows in there.items():
        assert set(range(*new.range_of(rank))) <= rows


def test_nothing_moves_where_nothing_changes():
    layout = Layout(100, (3, 1, 0, 2))
    stay = {rank: rank for rank in range(4)}
    assert relayout(layout, 4, stay) == layout
    assert moves(layout, layout, stay) == ()


def test_a_replaced_rank_costs_its_own_block_only():
    old = Layout(12, (0, 1, 2))
    new = relayout(old, 3, {1: 0, 2: 1})  # rank 0 leaves, a newcomer comes last
    assert new.owners == (2, 0, 1)
    assert [(m.source, m.target, m.start, m.stop) for m in moves(old, new, {1: 0, 2: 1})] == [(0, 2, 0, 4)]


def test_moves_carry_an_array_over():
    old, kept = Layout(11, (1, 0, 2)), [0, 2, 3, 4]
    carried = carried_by(kept, 3)
    new = relayout(old, 4, carried)
    data = np.arange(11)
    parts = {rank: np.full(11, -1) for rank in range(4)}
    for rank, target in carried.items():
        parts[target][slice(*old.range_of(rank))] = data[slice(*old.range_of(rank))]
    for move in moves(old, new, carried):
        parts[move.target][move.start : move.stop] = data[move.start : move.stop]
    for rank in range(4):
        rows = slice(*new.range_of(rank))
        assert parts[rank][rows].tolist() == data[rows].tolist()


@given(st.integers(0, 30), st.permutations(range(7)), st.integers(0, 6))
def test_neighbours_hold_the_rows_next_to_the_own(rows, owners, rank):
    layout = Layout(rows, tuple(owners))
    held = holder(layout)
    before, after = layout.neighbours(rank)
    if rank not in held:
        assert (before, after) == (None, None)
        return
    start, stop = layout.range_of(rank)
    assert before == (held[start - 1] if start else None)
    assert after == (held[stop] if stop < rows else None)
    for other, back in ((before, 1), (after, 0)):
        if other is not None:
            assert layout.neighbours(other)[back] == rank
