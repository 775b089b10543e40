"""Copies in memory: which state is whole after a loss, and who sends which rows of it to whom."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.partition import block
from hpc_elastic.runtime.copies import Block, Holding, newest, routes


def held_after(rows, size, lost):
    """What each survivor of `size` ranks in a ring holds of an array of so many rows."""
    ranges = [block(rows, size, rank) for rank in range(size)]
    return [[ranges[rank], ranges[(rank - 1) % size]] for rank in range(size) if rank not in lost]


@st.composite
def losses(draw):
    size = draw(st.integers(2, 8))
    lost = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    return draw(st.integers(0, 40)), size, lost


@given(losses(), st.integers(0, 2))
def test_whole_unless_neighbours_are_lost(loss, joining):
    """What is whole comes to each rank of the next generation, once, from somebody who holds it."""
    rows, size, lost = loss
    held = held_after(rows, size, lost)
    holdings = [[Holding((0, 1, 7), tuple(Block("a", *span) for span in own))] for own in held]
    gone_with_neighbour = [
        rank for rank in lost if (rank + 1) % size in lost and block(rows, size, rank)[0] < block(rows, size, rank)[1]
    ]
    assert newest(holdings, {"a": rows}) == (None if gone_with_neighbour else (0, 1, 7))
    if gone_with_neighbour or joining:
        return
    wanted = [block(rows, len(held), rank) for rank in range(len(held))]
    moves = routes(held, wanted)
    for target, (start, stop) in enumerate(wanted):
        got = np.concatenate([np.arange(m.start, m.stop) for m in moves if m.target == target] or [np.empty(0, int)])
        np.testing.assert_array_equal(got, np.arange(start, stop))
    for move in moves:
        assert any(first <= move.start and move.stop <= last for first, last in held[move.source])
        if move.source != move.target:
            mine = {row for first, last in held[move.target] for row in range(first, last)}
            assert not mine & set(range(move.start, move.stop))


def test_the_newest_that_is_whole():
    def has(*steps):
        return [Holding((0, 1, step), (Block("a", 0, 4),)) for step in steps]

    assert newest([has(5, 9), has(5)], {"a": 4}) == (0, 1, 9)
    assert newest([has(5, 9), has(9, 5)], {"a": 4}) == (0, 1, 9)
    assert newest([has(5), []], {"a": 4}) == (0, 1, 5)  # the second is a newcomer
    assert newest([has(5)], {"a": 5}) is None
    assert newest([has(5)], {}) == (0, 1, 5)
    assert newest([], {}) is None


def test_a_later_loop_is_newer():
    held = [[Holding((0, 1, 99), ()), Holding((0, 2, 1), ())]]
    assert newest(held, {}) == (0, 2, 1)


def test_the_same_step_of_two_generations():
    """After a loss a step is copied again, in other blocks: half of the one and half of the other are no whole."""
    old = [Holding((1, 1, 5), (Block("a", 0, 2),))]
    new = Holding((2, 1, 5), (Block("a", 1, 3), Block("a", 2, 4)))
    assert newest([old, [new]], {"a": 4}) is None
    whole = Holding((2, 1, 5), (Block("a", 0, 2),))
    assert newest([[*old, whole], [new]], {"a": 4}) == (2, 1, 5)
