"""The order of the canonical sum: one tree, however the leaves are spread over ranks and whichever are missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_elastic.errors import StepError
from hpc_elastic.reduce.order import Node, TreeSum, present, roots

quick = settings(deadline=None, max_examples=200)


def pair(left, right):
    return (left, right)


def add(left, right):
    return np.add(left, right, out=left)


def reference(values, combine=pair):
    """Sum `values` (None is a missing leaf) level by level: neighbours first, one without a partner passes on upwards."""
    while len(values) > 1:
        level = []
        for i in range(0, len(values), 2):
            left, right = values[i], values[i + 1] if i + 1 < len(values) else None
            level.append(right if left is None else left if right is None else combine(left, right))
        values = level
    return values[0]


def spread(values, cuts, combine=pair):
    """Sum as ranks do: subtrees within the intervals between `cuts`, then those of all ranks."""
    total = len(values)
    empty = {i for i, value in enumerate(values) if value is None}
    top = TreeSum(combine)
    for start, stop in itertools.pairwise(cuts):
        own = TreeSum(combine, start)
        for leaf in range(start, stop):
            if leaf not in empty:
                own.feed(Node(0, leaf), values[leaf])
        nodes = present(roots(start, stop, total), empty, total)
        parts = own.subtrees(nodes)
        assert len(parts) == len(nodes)
        for node, part in zip(nodes, parts, strict=True):
            top.feed(node, part)
    return top.total()


@st.composite
def spreads(draw):
    """Leaves, of which some are missing but not all, and how they are cut into intervals, some of them empty."""
    total = draw(st.integers(1, 40))
    there = draw(st.sets(st.integers(0, total - 1), min_size=1)) if draw(st.booleans()) else set(range(total))
    inner = draw(st.lists(st.integers(0, total), max_size=6))
    return total, there, [0, *sorted(inner), total]


@quick
@given(spreads())
@example((6, {4, 5}, [0, 6]))
@example((5, {0, 4}, [0, 1, 1, 4, 5]))
@example((11, set(range(11)), [0, 3, 8, 11]))
def test_one_expression_however_it_is_spread(case):
    total, there, cuts = case
    values = [i if i in there else None for i in range(total)]
    expected = reference(values)
    assert spread(values, cuts) == expected
    assert spread(values, [0, total]) == expected


@settings(deadline=None, max_examples=40)
@given(spreads(), st.integers(0, 2**32 - 1))
def test_one_set_of_bits_however_it_is_spread(case, seed):
    total, there, cuts = case
    rng = np.random.default_rng(seed)
    data = (rng.standard_normal((total, 5)) * 10.0 ** rng.integers(-6, 6, (total, 5))).astype(np.float32)
    expected = reference([data[i].copy() if i in there else None for i in range(total)], lambda a, b: a + b)
    for cut in (cuts, [0, total], list(range(total + 1))):
        got = spread([data[i].copy() if i in there else None for i in range(total)], cut, add)
        assert got.dtype == np.float32
        assert got.tobytes() == expected.tobytes()


def test_the_order_matters_to_the_bits():
    """Else the test before would show nothing."""
    values = np.float32([1e8, 1, -1e8, 1])
    assert reference(list(values), lambda a, b: a + b) != np.float32(1)
    assert ((values[0] + values[2]) + values[1]) + values[3] == np.float32(2)


def test_the_tree_by_hand():
    assert reference(list(range(5))) == (((0, 1), (2, 3)), 4)
    assert spread(list(range(5)), [0, 3, 5]) == (((0, 1), (2, 3)), 4)
    assert spread(list(range(6)), [0, 6]) == (((0, 1), (2, 3)), (4, 5))
    assert spread([0, None, 2, 3, None, 5], [0, 1, 6]) == ((0, (2, 3)), 5)


def subtrees(total):
    """All subtrees of the tree over `total` leaves, smallest first, as sets of leaves by node."""
    level, found = 0, {}
    while True:
        nodes = {Node(level, i): set(range(i << level, min(total, (i + 1) << level))) for i in range(-(-total >> level))}
        found |= nodes
        if len(nodes) == 1:
            return found
        level += 1


@quick
@given(st.integers(1, 40), st.data())
def test_roots_are_the_largest_subtrees_that_tile(total, data):
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    found = roots(start, stop, total)
    assert [leaf for node in found for leaf in node.leaves(total)] == list(range(start, stop))
    trees = subtrees(total)
    within = [leaves for leaves in trees.values() if leaves <= set(range(start, stop))]
    for node in found:
        assert trees[node] == set(node.leaves(total))
        larger = [leaves for leaves in within if leaves > trees[node]]
        assert not larger, f"{node} is not the largest subtree there: {larger}"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0, 11, 11), [Node(4, 0)]),
        ((8, 11, 11), [Node(2, 2)]),
        ((3, 16, 16), [Node(0, 3), Node(2, 1), Node(3, 1)]),
        ((0, 6, 8), [Node(2, 0), Node(1, 2)]),
        ((4, 4, 8), []),
        ((0, 1, 1), [Node(0, 0)]),
    ],
)
def test_roots_by_hand(interval, expected):
    start, stop, total = interval
    found = roots(start, stop, total)
    assert [list(node.leaves(total)) for node in found] == [list(node.leaves(total)) for node in expected]
    assert sum(len(node.leaves(total)) for node in found) == stop - start
    assert len(found) == len(expected)


def test_present_leaves_out_what_has_no_leaf():
    assert present([Node(1, 0), Node(1, 1), Node(0, 4)], {0, 1, 4}, 5) == [Node(1, 1)]
    assert present([Node(2, 1)], {4}, 5) == []
    assert present([Node(2, 1)], {4}, 6) == [Node(2, 1)]


def test_operands_are_combined_as_soon_as_both_are_there():
    """A rank keeps about as many sums as the tree has levels, not one for each microbatch."""
    tree = TreeSum(pair)
    for leaf in range(64):
        tree.feed(Node(0, leaf), leaf)
        assert len(tree._stack) <= 8
    assert tree.total() == reference(list(range(64)))


def test_a_tree_can_be_used_again():
    tree = TreeSum(pair)
    for _ in range(2):
        for leaf in range(3):
            tree.feed(Node(0, leaf), leaf)
        assert tree.total() == ((0, 1), 2)
    for _ in range(2):
        for leaf in range(3):
            tree.feed(Node(0, leaf), leaf)
        assert tree.subtrees(roots(0, 3, 4)) == [(0, 1), 2]


@quick
@given(spreads())
def test_missing_leaves_may_be_told_of(case):
    total, there, _ = case
    tree = TreeSum(pair)
    for leaf in range(total):
        if leaf in there:
            tree.feed(Node(0, leaf), leaf)
        else:
            tree.skip(Node(0, leaf))
    assert tree.total() == reference([i if i in there else None for i in range(total)])


@pytest.mark.parametrize("second", [Node(0, 2), Node(0, 3), Node(1, 1), Node(2, 0)])
def test_leaves_come_in_their_order(second):
    tree = TreeSum(pair)
    tree.feed(Node(0, 3), 3)
    with pytest.raises(StepError, match=r"microbatch \d was added after 3"):
        tree.feed(second, 2)
    tree.skip(Node(0, 1))  # known long since, and changes nothing
    with pytest.raises(StepError, match=r"was added after 3"):
        tree.feed(Node(0, 2), 2)


def test_siblings_do_not_wait_for_the_next_leaf():
    """Each value kept is a set of gradients: there is never one more than there are whole subtrees."""
    tree = TreeSum(pair)
    for leaf in range(64):
        tree.feed(Node(0, leaf), leaf)
        assert len(tree._stack) == (leaf + 1).bit_count()
