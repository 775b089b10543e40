"""The canonical sum over fake ranks: the same bits at any number of ranks, of whatever structure, dtype and size."""

from __future__ import annotations

import os
import queue
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_elastic import reduce
from hpc_elastic.comm import board
from hpc_elastic.comm.board import Board
from hpc_elastic.comm.messages import FILL_TAG, PART_TAG
from hpc_elastic.comm.waiting import Lost, Watch
from hpc_elastic.errors import StepError
from hpc_elastic.model import Member

from .in_threads import LIMIT_S, Threads

TAGS = FILL_TAG, PART_TAG


class FakeWorld(Threads):
    """The ranks of one process: `FakeRanks` in threads that meet at a barrier. Stands in for `comm.world.World`.

    Their boards and segments are real ones, as of so many `hosts`: rank r is on host r modulo `hosts`.
    """

    def __init__(self, size, hosts=1):
        super().__init__(size, FakeRanks)
        self.hosts = hosts
        self.board = [None] * size
        self.mail = {(a, b, tag): queue.SimpleQueue() for a in range(size) for b in range(size) for tag in TAGS}


class FakeRanks:
    """One rank of a `FakeWorld`."""

    def __init__(self, world, rank):
        self.world, self.rank, self.size = world, rank, world.size
        self.watch = Watch(self._check)
        self.kept = {}
        self.board = Board(self, [Member(id=r, pid=os.getpid(), host=f"host{r % world.hosts}") for r in range(self.size)])

    def _check(self):
        if self.world.barrier.broken:
            raise threading.BrokenBarrierError

    def keep(self, name, make):
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def library_sum(self, array):
        parts = self._meet(array.copy())
        array[...] = sum(parts[1:], parts[0])

    def _meet(self, mine):
        self.world.board[self.rank] = mine
        self.world.barrier.wait()
        board = list(self.world.board)
        self.world.barrier.wait()
        return board

    def barrier(self, among):
        """Stand in for a barrier of some by one of all: in the sum they all come."""
        assert self.rank in among
        self._meet(None)

    def gather_all(self, data):
        return self._meet(data)

    def all_parts(self, mine, out, counts):
        assert mine.size == counts[self.rank]
        assert out.size == sum(counts)
        assert mine.flags.c_contiguous
        board = self._meet((mine.copy(), list(counts)))
        assert all(theirs == list(counts) for _, theirs in board)
        assert all(part.dtype == out.dtype for part, _ in board)
        out[...] = np.concatenate([part for part, _ in board])

    @contextmanager
    def flight(self, _nbytes, circles):
        assert all(self.rank in ranks for ranks in circles)
        flight = FakeFlight(self)
        yield flight
        for receives in flight.under_way:
            flight.wait(receives)


class FakeFlight:
    """Messages between the threads, by tag."""

    def __init__(self, ranks):
        self.mail, self.rank = ranks.world.mail, ranks.rank
        self.under_way = []

    def begin(self, sends, receives, tag):
        for rank, array in sends:
            assert array.flags.c_contiguous
            if array.nbytes:
                self.mail[self.rank, rank, tag].put(array.copy())
        self.under_way.append([(rank, array, tag) for rank, array in receives if array.nbytes])
        return self.under_way[-1]

    def wait(self, receives):
        while receives:
            rank, array, tag = receives.pop(0)
            array[...] = self.mail[rank, self.rank, tag].get(timeout=LIMIT_S)


def tree_sum(values):
    """Sum level by level, neighbours first; None is a missing one. Written apart from the code under test."""
    while len(values) > 1:
        values = [
            right if left is None else left if right is None else left + right
            for left, right in zip(values[::2], [*values[1::2], None][: len(values[::2])], strict=True)
        ]
    return values[0]


def noise(step, leaf, shape, dtype):
    rng = np.random.default_rng([step, leaf, len(shape)])
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else rng.integers(-99, 99, shape).astype(dtype)


def weight_of(leaf, leaves, empty):
    there = [i for i in range(leaves) if i not in empty]
    return (there.index(leaf) + 1) / sum(range(len(there) + 1))


def use(total, step, leaves, empty, values):
    """One step: add the own leaves, and reduce."""
    low, high = total.interval
    for leaf in range(low, high):
        if leaf not in empty:
            metrics = {"loss": float(noise(step, leaf, (), "f8")), "hits": float(leaf)}
            total.add(leaf, values(step, leaf), metrics, weight_of(leaf, leaves, empty))
    return total.reduce(empty)


def run(size, leaves, empties, values, consume, hosts=1):
    """Return, for every rank, ``consume(result, metrics)`` of each step; step k lacks the leaves ``empties[k]``."""

    def body(ranks):
        total = reduce.Sum(leaves, lambda: ranks)
        return [consume(*use(total, step, leaves, empty, values)) for step, empty in enumerate(empties)]

    return FakeWorld(size, hosts).run(body)


def bits(tree):
    """A structure with every array replaced by its form and bytes."""
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(bits(value) for value in tree)
    return tree.dtype.str, tree.shape, tree.tobytes()


def mixed(step, leaf):
    return {
        "w": noise(step, leaf, (3, 2), "f4"),
        "rest": [noise(step, leaf, (5,), "f8"), (noise(step, leaf, (), "i8"), noise(step, leaf, (4,), "f2"))],
        "b": noise(step, leaf, (7,), "f4"),
        "none": np.empty((0, 3), "f4"),
    }


def check_all_sizes(leaves, empties, values, sizes=(1, 2, 3, 4)):
    """Check that all ranks at all sizes, on one host or more, get the same bits; return those and the metrics."""
    worlds = [(size, hosts) for size in sizes for hosts in range(1, min(size, 3) + 1)]
    found = [
        run(size, leaves, empties, values, lambda tree, metrics: (bits(tree), metrics), hosts) for size, hosts in worlds
    ]
    for ranks in found:
        for steps in ranks:
            assert steps == found[0][0]
    return found[0][0]


def test_the_sum_is_that_of_the_tree():
    leaves, empty = 6, {4}
    ((got, metrics),) = check_all_sizes(leaves, [empty], mixed)
    there = [leaf if leaf not in empty else None for leaf in range(leaves)]

    def expected(take, dtype):
        weights = [None if i is None else np.dtype(dtype).type(weight_of(i, leaves, empty)) for i in there]
        return tree_sum([None if i is None else take(mixed(0, i)) * weights[i] for i in there])

    assert got["w"] == bits(expected(lambda v: v["w"], "f4"))
    assert got["b"] == bits(expected(lambda v: v["b"], "f4"))
    assert got["rest"][0] == bits(expected(lambda v: v["rest"][0], "f8"))
    assert got["rest"][1][1] == bits(expected(lambda v: v["rest"][1][1], "f2"))
    assert got["rest"][1][0] == bits(sum(mixed(0, i)["rest"][1][0] for i in range(leaves) if i not in empty))
    assert got["none"] == ("<f4", (0, 3), b"")
    assert isinstance(got["rest"], list)
    assert isinstance(got["rest"][1], tuple)
    assert list(metrics) == ["loss", "hits"]
    losses = [None if i is None else float(noise(0, i, (), "f8")) * weight_of(i, leaves, empty) for i in there]
    assert metrics["loss"] == tree_sum(losses)
    assert isinstance(metrics["hits"], float)


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 20), st.data(), st.sampled_from([0, 300, 1 << 15]))
@example(4, None, 0)
def test_same_bits_at_all_sizes(leaves, data, small):
    empties = [set()]
    if data is not None:
        missing = st.sets(st.integers(0, leaves - 1), max_size=leaves - 1)
        empties += data.draw(st.lists(missing, max_size=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "SMALL_BYTES", small)
        check_all_sizes(leaves, empties, mixed, sizes=(1, *range(2, min(4, leaves) + 1)))


def test_both_ways_across_give_the_same_bits(monkeypatch):
    found = []
    for small in (0, 1 << 30):
        monkeypatch.setattr(reduce, "SMALL_BYTES", small)
        found.append(check_all_sizes(7, [set(), {0, 1, 2}, set()], mixed))
    assert found[0] == found[1]


def test_large_buffers_are_cut_into_slices():
    assert reduce.SMALL_BYTES < 40_001 * 4
    check_all_sizes(
        5, [set(), {2}, set()], lambda step, leaf: [noise(step, leaf, (40_001,), "f4"), noise(step, leaf, (9,), "f8")]
    )


def test_slices_may_be_empty(monkeypatch):
    monkeypatch.setattr(reduce, "SMALL_BYTES", 0)
    check_all_sizes(5, [set(), set()], lambda step, leaf: noise(step, leaf, (2,), "f4"))


@pytest.mark.parametrize("small", [0, 1 << 15])
def test_without_metrics_and_with_empty_arrays(monkeypatch, small):
    monkeypatch.setattr(reduce, "SMALL_BYTES", small)

    def body(ranks):
        total, found = reduce.Sum(8, lambda: ranks), []
        for step in range(6):
            for leaf in range(*total.interval):
                values = noise(step, leaf, (4,), "f4"), np.empty((2, 0), "f8"), np.empty(0, "i4")
                total.add(leaf, values, {}, 0.125)
            values, metrics = total.reduce(set())
            found.append((bits(values), metrics))
        return found

    expected = FakeWorld(1).run(body)[0]
    for size in (2, 3, 4):
        assert FakeWorld(size).run(body) == [expected] * size


@pytest.mark.parametrize(
    "tree",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, x + 1),
        lambda x: {"a": x, "b": [x, (x,)]},
        lambda x: [[], x, {}],
        lambda x: float(x[0]),
    ],
    ids=["array", "list", "tuple", "nested", "with empty ones", "number"],
)
def test_the_structure_comes_back(tree):
    def shape(value):
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(shape(item) for item in value)
        return np.shape(value)

    def consume(values, _metrics):
        return shape(values)

    for size in (1, 2):
        got = run(size, 3, [set()], lambda step, leaf: tree(noise(step, leaf, (2,), "f8")), consume)
        assert got == [[shape(tree(np.zeros(2)))]] * size


def test_floats_are_weighted_and_integers_are_not():
    def body(ranks):
        total = reduce.Sum(2, lambda: ranks)
        for leaf in range(*total.interval):
            total.add(leaf, {"mean": np.float32([8]), "count": np.int64([8])}, {"loss": 8.0}, [0.25, 0.5][leaf])
        values, metrics = total.reduce(set())
        return values["mean"].tolist(), values["count"].tolist(), metrics

    for size in (1, 2):
        assert FakeWorld(size).run(body) == [([6.0], [16], {"loss": 6.0})] * size


@pytest.mark.parametrize("wire", [None, "bfloat16"])
def test_sums_are_not_weighted_nor_rounded(wire):
    def body(ranks):
        total = reduce.Sum(2, lambda: ranks, wire=wire)
        for leaf in range(*total.interval):
            total.add(leaf, [np.float32([8])], {"loss": 8.0}, [0.25, 0.5][leaf], {"n": np.float32([1001 + leaf])})
        (values, sums), metrics = total.reduce(set())
        return values[0].tolist(), sums["n"].tolist(), metrics

    for size in (1, 2):
        assert FakeWorld(size).run(body) == [([6.0], [2003.0], {"loss": 6.0})] * size


def test_sums_have_to_stay_sums():
    total = reduce.Sum(2, lambda: FakeRanks(FakeWorld(1), 0))
    total.add(0, [np.zeros(1)], {}, 0.5, [np.zeros(1)])
    with pytest.raises(StepError, match="must stay the same"):
        total.add(1, ([np.zeros(1)], [np.zeros(1)]), {}, 0.5)


def test_what_was_added_is_neither_kept_nor_changed():
    def body(ranks):
        total = reduce.Sum(4, lambda: ranks)
        for leaf in range(*total.interval):
            own = np.full(3, leaf + 1.0)
            total.add(leaf, own, {}, 1.0)
            assert own.tolist() == [leaf + 1.0] * 3
            own[:] = np.nan
        return total.reduce(set())[0].tolist()

    for size in (1, 2, 3):
        assert FakeWorld(size).run(body) == [[10.0] * 3] * size


def test_a_result_is_valid_until_the_next_reduce():
    def body(ranks):
        total = reduce.Sum(8, lambda: ranks)
        previous = None
        for step in range(5):
            for leaf in range(*total.interval):
                total.add(leaf, noise(step, leaf, (4,), "f4"), {}, 1.0)
                if previous is not None:
                    assert previous[0].tobytes() == previous[1]
            result = total.reduce(set())[0]
            previous = result, result.tobytes()

    for size in (1, 2, 3):
        FakeWorld(size).run(body)


@pytest.mark.parametrize("small", [0, 1 << 15])
def test_buffers_are_used_again(small, monkeypatch):
    """Steps do not make a job grow: after the first its segment stays as it is, also where steps are begun anew."""
    monkeypatch.setattr(reduce, "SMALL_BYTES", small)

    def body(ranks):
        total = reduce.Sum(8, lambda: ranks)
        lengths = []
        for step in range(8):
            if step % 3 == 2:  # as if another rank had been lost meanwhile
                for leaf in range(*total.interval):
                    total.add(leaf, mixed(step, leaf), {"loss": 1.0, "hits": 1.0}, 1.0)
                total.drop()
            use(total, step, 8, set(), mixed)
            lengths.append(len(total._parts[0]._slots._slots))
        return lengths

    for size in (1, 2, 4):
        for lengths in FakeWorld(size).run(body):
            assert len(set(lengths[1:])) == 1, f"at {size} ranks, buffers by step: {lengths}"


def test_after_a_loss_results_lie_elsewhere(monkeypatch):
    """Messages of the sum in which somebody was lost may still come into where its result was to be."""
    monkeypatch.setattr(reduce, "SMALL_BYTES", 0)
    now, sums, places = [None] * 2, [reduce.Sum(4, lambda r=r: now[r]) for r in range(2)], [None] * 2

    def lost(_flight, _receives):
        raise Lost(frozenset({7}))

    def add(ranks):
        now[ranks.rank] = ranks
        total = sums[ranks.rank]
        for leaf in range(*total.interval):
            total.add(leaf, mixed(0, leaf), {"loss": 1.0, "hits": 1.0}, 1.0)
        return total

    def first(ranks):
        total = add(ranks)
        places[ranks.rank] = total._parts[0]._slots.result().offset
        with pytest.raises(Lost):
            total.exchange(set())
        total.drop()

    def again(ranks):
        total = add(ranks)
        total.exchange(set())
        assert total._parts[0]._slots.result().offset != places[ranks.rank]
        return bits(total.result()[0])

    with monkeypatch.context() as patch:
        patch.setattr(FakeFlight, "wait", lost)
        FakeWorld(2, hosts=2).run(first)
    alone = reduce.Sum(4, lambda: FakeWorld(1).run(lambda ranks: ranks)[0])
    for leaf in range(4):
        alone.add(leaf, mixed(0, leaf), {"loss": 1.0, "hits": 1.0}, 1.0)
    alone.exchange(set())
    assert FakeWorld(2, hosts=2).run(again) == [bits(alone.result()[0])] * 2


def test_results_are_read_only():
    """Other ranks may read the same memory."""
    for size in (1, 2):
        for values in FakeWorld(size).run(lambda ranks: use(reduce.Sum(4, lambda: ranks), 0, 4, set(), mixed)[0]):
            with pytest.raises(ValueError, match="read-only"):
                values["w"][0] = 1


def test_where_stores_are_not_ordered_ranks_meet_by_messages(monkeypatch):
    monkeypatch.setattr(board, "ORDERED", False)
    monkeypatch.setattr(reduce, "SMALL_BYTES", 0)
    check_all_sizes(5, [set(), {1}], mixed, sizes=(1, 2))


@pytest.mark.parametrize("hosts", [1, 2])
def test_where_memory_is_not_shared_messages_carry_all(hosts, monkeypatch):
    """As in containers with process numbers of their own: each rank is taken for a host by itself."""
    expected = run(1, 5, [set(), {1}], mixed, lambda tree, metrics: (bits(tree), metrics))
    monkeypatch.setattr(board, "_page", lambda _pid, _card: None)
    for small in (0, 1 << 15):
        monkeypatch.setattr(reduce, "SMALL_BYTES", small)
        assert run(3, 5, [set(), {1}], mixed, lambda tree, metrics: (bits(tree), metrics), hosts) == expected * 3
    assert FakeWorld(4, 2).run(lambda ranks: ranks.board.hosts) == [((0,), (1,), (2,), (3,))] * 4


def test_a_rank_that_ends_before_its_memory_is_mapped_is_lost():
    def lost():
        raise Lost(frozenset({7}))

    def body(ranks):
        ranks.watch.check = lost
        ranks.board.map(0, 999_999, 4096)

    with pytest.raises(Lost, match="process 7"):
        FakeWorld(1).run(body)


@pytest.mark.parametrize("sizes", [(1, 3, 1, 2), (4, 1, 4), (2, 4, 3)])
def test_the_number_of_ranks_may_change_between_steps(sizes):
    """A rank's own sum goes on with the ranks of the next generation."""
    sums = [None] * 4
    now = [None] * 4
    for step, size in enumerate(sizes):

        def body(ranks, step=step):
            rank = ranks.rank
            now[rank] = ranks
            if sums[rank] is None:
                sums[rank] = reduce.Sum(8, lambda: now[rank])
            return bits(use(sums[rank], step, 8, set(), mixed)[0])

        alone = FakeWorld(1).run(lambda ranks, step=step: bits(use(reduce.Sum(8, lambda: ranks), step, 8, set(), mixed)[0]))
        assert FakeWorld(size).run(body) == alone * size


def test_a_newcomer_may_have_no_share_of_its_first_step():
    """As at the last, small batch of an epoch: it has added nothing, and gets the sum all the same."""

    def body(ranks):
        total = reduce.Sum(4, lambda: ranks)
        values, metrics = use(total, 0, 4, {2, 3}, mixed)
        return bits(values), metrics, bits(use(total, 1, 4, set(), mixed)[0])

    (alone,) = FakeWorld(1).run(body)
    for size in (2, 4):
        assert FakeWorld(size).run(body) == [alone] * size


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.zeros(2), "a": np.zeros(2)},
        {"a": np.zeros(2), "c": np.zeros(2)},
        {"a": np.zeros(2)},
        {"a": np.zeros(2), "b": np.zeros(3)},
        {"a": np.zeros(2), "b": np.zeros(2, np.float32)},
        [np.zeros(2), np.zeros(2)],
        {"a": [np.zeros(2), np.zeros(2)]},
    ],
    ids=["order", "key", "fewer", "shape", "dtype", "kind", "nesting"],
)
def test_a_changed_structure_is_refused(other):
    total = reduce.Sum(2, lambda: FakeRanks(FakeWorld(1), 0))
    total.add(0, {"a": np.zeros(2), "b": np.zeros(2)}, {"loss": 1.0}, 0.5)
    with pytest.raises(StepError, match="must stay the same"):
        total.add(1, other, {"loss": 1.0}, 0.5)


def test_changed_metrics_are_refused():
    total = reduce.Sum(2, lambda: FakeRanks(FakeWorld(1), 0))
    total.add(0, np.zeros(2), {"loss": 1.0}, 0.5)
    for metrics in ({}, {"accuracy": 1.0}, {"loss": 1.0, "accuracy": 1.0}):
        with pytest.raises(StepError, match="metrics"):
            total.add(1, np.zeros(2), metrics, 0.5)


@pytest.mark.parametrize("value", [np.array([None]), "text", np.array([1j]), None, [np.zeros(2), object()]])
def test_what_has_no_sum_is_refused(value):
    total = reduce.Sum(1, lambda: FakeRanks(FakeWorld(1), 0))
    with pytest.raises(StepError, match=r"can't sum a value of type \w+"):
        total.add(0, value, {}, 1.0)


def test_reduce_needs_something_added():
    total = reduce.Sum(1, lambda: FakeRanks(FakeWorld(1), 0))
    with pytest.raises(StepError, match=r"without any step\.add"):
        total.reduce(set())
