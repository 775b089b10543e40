"""How sums between hosts are cut: each element once, in pieces that are short enough, and added up along the one tree."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic.reduce.form import ALIGN_BYTES
from hpc_elastic.reduce.lanes import buckets, plan_of
from hpc_elastic.reduce.order import shares, whole_tree

quick = settings(deadline=None, max_examples=100)


@st.composite
def hosts(draw, most=8):
    """Ranks spread over hosts, which come in the order of their first rank."""
    of = draw(st.lists(st.integers(0, 3), min_size=1, max_size=most))
    return tuple(tuple(rank for rank, host in enumerate(of) if host == each) for each in dict.fromkeys(of))


@quick
@given(hosts(), st.integers(0, 3000), st.sampled_from([1, 2, 4, 8, 16]), st.integers(ALIGN_BYTES, 5000))
def test_each_element_is_in_one_piece(spread, length, itemsize, piece_bytes):
    lanes = max(map(len, spread))
    order, times = [], np.zeros(length, int)
    for bucket in buckets(length, itemsize, spread, range(lanes), piece_bytes):
        order.append(bucket)
        assert len(bucket.pieces) == len(spread)
        for piece in bucket.pieces:
            times[piece] += 1
            assert (piece.stop - piece.start) * itemsize <= piece_bytes
    assert (times == 1).all()
    for lane in range(lanes):  # who keeps one lane goes through its buckets as all do
        own = list(buckets(length, itemsize, spread, [lane], piece_bytes))
        assert own == [bucket for bucket in order if bucket.lane == lane]


def test_few_buckets_where_one_does():
    assert len(list(buckets(1000, 4, ((0,), (1,)), [0], 2048))) == 1
    assert len(list(buckets(10_000, 4, ((0,), (1,)), [0], 2048))) == 10
    assert not list(buckets(0, 4, ((0,), (1,)), [0], 2048))


def add(tree, values):
    """Return the sum as a text, in which the order of adding is seen."""
    return values[tree] if isinstance(tree, int) else f"({add(tree[0], values)}+{add(tree[1], values)})"


@quick
@given(hosts(), st.data())
def test_the_tree_is_the_same_on_all_hosts(spread, data):
    ranks = sum(map(len, spread))
    leaves = data.draw(st.integers(ranks, 20))
    empty = data.draw(st.sets(st.integers(0, leaves - 1), max_size=leaves - 1))
    there = shares(leaves, ranks, frozenset(empty))
    expected = add(whole_tree(there), [f"{node.level}.{node.index}" for nodes in there for node in nodes])
    plans = [plan_of(there, spread, host) for host in range(len(spread))]
    parts = [[f"{node.level}.{node.index}" for rank in of_host for node in there[rank]] for of_host in spread]
    sums = [
        [add(tree, [own[i] for i in indices]) for indices, tree in plan.own] for plan, own in zip(plans, parts, strict=True)
    ]
    for host, plan in enumerate(plans):
        assert plan.counts == tuple(map(len, sums))
        operands = [parts[host][i] if number == host else sums[number][i] for number, i in plan.order]
        assert add(plan.tree, operands) == expected
        assert plan.rows >= len(plan.own) * (len(spread) - 1)
