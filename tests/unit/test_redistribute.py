"""Distributed arrays over fake ranks: whatever the memberships, the array stays what it was."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_elastic.errors import ArrayError
from hpc_elastic.partition import Layout
from hpc_elastic.redistribute import DistributedArray, Form, halo_moves

from .in_threads import Threads

quick = settings(deadline=None, max_examples=40)


class FakeWorld(Threads):
    """Ranks in threads, which meet at a barrier to swap their messages. Stands in for `comm.world.World`."""

    def __init__(self, size):
        super().__init__(size, FakeRanks)
        self.mail = [None] * size


class FakeRanks:
    """One rank of a `FakeWorld`."""

    def __init__(self, world, rank):
        self.world, self.rank, self.size = world, rank, world.size

    def exchange(self, sends, receives):
        assert all(move.source == self.rank and 0 <= move.target < self.size for move, _ in sends)
        assert all(move.target == self.rank and 0 <= move.source < self.size for move, _ in receives)
        assert all(array.flags.c_contiguous for _, array in (*sends, *receives)), "MPI would need a copy"
        assert all(len(array) == move.stop - move.start > 0 for move, array in (*sends, *receives))
        self.world.mail[self.rank] = [(move, array.copy()) for move, array in sends]
        self.world.barrier.wait()
        mine = [(move, rows) for sent in self.world.mail for move, rows in sent if move.target == self.rank]
        self.world.barrier.wait()
        assert {move for move, _ in mine} == {move for move, _ in receives}
        # Messages between two ranks do not overtake each other: the order of both sides must be the same.
        for source in range(self.size):
            assert [m for m, _ in mine if m.source == source] == [m for m, _ in receives if m.source == source]
        for move, array in receives:
            ((_, rows),) = [(sent, rows) for sent, rows in mine if sent == move]
            array[...] = rows


class Process:
    """One process: its array, and the ranks that it belongs to now."""

    def __init__(self, shape, dtype, ranks=None):
        self.ranks = ranks
        self.array = DistributedArray("u", shape, dtype, lambda: self.ranks)


def whole(shape, dtype):
    return (np.arange(np.prod(shape, dtype=int)) % 251 + 1).reshape(shape).astype(dtype)


def start(size, shape, dtype="f8"):
    """Processes of a first generation, with the rows of `whole` in their arrays."""
    world = FakeWorld(size)
    processes = [Process(shape, dtype, FakeRanks(world, rank)) for rank in range(size)]
    for process in processes:
        array = process.array
        array.local[:] = whole(shape, dtype)[array.start : array.stop]
    return processes


def together(processes, body):
    """Run ``body(process)`` on all processes at once, in a world of their own."""
    world = FakeWorld(len(processes))

    def one(ranks):
        process = processes[ranks.rank]
        process.ranks = ranks
        return body(process)

    return world.run(one)


def resize(processes, kept, joining):
    """Return the processes of the next generation; the bytes that moved are checked to be the same on all."""
    shape, dtype = processes[0].array.shape, processes[0].array.dtype
    form = msgspec.msgpack.decode(msgspec.msgpack.encode(processes[0].array.form()), type=Form)
    merged = [*processes, *(Process(shape, dtype) for _ in range(joining))]
    old = {id(process): process.array.local for process in processes}

    def one(ranks):
        array = merged[ranks.rank].array
        if ranks.rank >= len(processes):
            array.adopt(form, ranks.rank)
        return array.redistribute(ranks, kept)

    moved = FakeWorld(len(merged)).run(one)
    assert len(set(moved)) == 1
    after = [merged[rank] for rank in kept]
    world = FakeWorld(len(after))
    for rank, process in enumerate(after):
        process.ranks = FakeRanks(world, rank)
    fresh = sum(
        len(p.array.local) - (len(set(range(p.array.start, p.array.stop)) & p.held) if id(p) in old else 0) for p in after
    )
    assert moved[0] == fresh * processes[0].array.row_bytes, "each row that is new to its rank moves once"
    return after


def check(processes, shape, dtype):
    expected = whole(shape, dtype)
    layouts = {process.array.layout for process in processes}
    assert len(layouts) == 1
    rows = []
    for process in processes:
        array = process.array
        rows += range(array.start, array.stop)
        assert array.local.dtype == np.dtype(dtype)
        assert array.local.shape == (array.stop - array.start, *shape[1:])
        assert array.local.tobytes() == expected[array.start : array.stop].tobytes()
        process.held = set(range(array.start, array.stop))
    assert sorted(rows) == list(range(shape[0]))


@st.composite
def histories(draw):
    """Rows, and a sequence of memberships: which ranks of the merged world are kept, and how many join."""
    size, steps = draw(st.integers(1, 4)), []
    first = size
    for _ in range(draw(st.integers(1, 4))):
        joining = draw(st.integers(0, 3))
        kept = sorted(draw(st.sets(st.integers(0, size + joining - 1), min_size=1, max_size=5)))
        steps.append((kept, joining))
        size = len(kept)
    shape = draw(st.sampled_from([(0,), (1,), (3,), (17,), (40,), (13, 2), (5, 0), (9, 2, 3)]))
    return first, steps, shape, draw(st.sampled_from(["f8", "f4", "i2", "?", "c16", ">f8"]))


@quick
@given(histories())
@example((1, [([0, 1, 2], 2), ([1, 2, 3, 4], 2), ([0], 0)], (10,), "f8"))
@example((2, [([2, 3], 2), ([1], 0)], (7, 2), "f4"))
def test_the_array_stays_what_it_was(history):
    size, steps, shape, dtype = history
    processes = start(size, shape, dtype)
    check(processes, shape, dtype)
    for kept, joining in steps:
        processes = resize(processes, kept, joining)
        check(processes, shape, dtype)
        (found, *others) = together(processes, lambda process: process.array.gather())
        assert found.tobytes() == whole(shape, dtype).tobytes()
        assert not any(other is not None for other in others)


@quick
@given(histories(), st.integers(0, 12))
def test_halos_are_the_rows_around(history, width):
    size, steps, shape, dtype = history
    processes = start(size, shape, dtype)
    check(processes, shape, dtype)
    kept, joining = steps[0]
    for turn in range(2):
        now = resize(processes, kept, joining) if turn else processes
        halos = together(now, lambda process: process.array.halo(width))
        for process, (before, after) in zip(now, halos, strict=True):
            array, expected = process.array, whole(shape, dtype)
            first, last = array.start, array.stop
            if first == last:
                assert (before.shape, after.shape) == ((0, *shape[1:]),) * 2
                continue
            assert before.tobytes() == expected[max(0, first - width) : first].tobytes()
            assert after.tobytes() == expected[last : last + width].tobytes()
            assert before.shape[1:] == after.shape[1:] == shape[1:]
            assert before.dtype == after.dtype == np.dtype(dtype)


@pytest.mark.parametrize(("size", "rows", "width"), [(3, 6, 5), (5, 3, 1), (5, 3, 4), (4, 4, 2), (1, 3, 2), (3, 0, 1)])
def test_halos_wider_than_blocks(size, rows, width):
    processes = start(size, (rows,))
    for process, (before, after) in zip(processes, together(processes, lambda p: p.array.halo(width)), strict=True):
        array = process.array
        there = range(rows) if array.start < array.stop else range(0)
        assert before.tolist() == [row + 1 for row in there if array.start - width <= row < array.start]
        assert after.tolist() == [row + 1 for row in there if array.stop <= row < array.stop + width]


def test_a_halo_is_a_copy():
    processes = start(2, (4,))
    for before, after in together(processes, lambda process: process.array.halo()):
        before[:] = after[:] = -1
    assert [p.array.local.tolist() for p in processes] == [[1, 2], [3, 4]]


@quick
@given(st.integers(0, 30), st.permutations(range(5)), st.integers(0, 12))
def test_halo_moves_are_what_is_needed(rows, owners, width):
    layout = Layout(rows, tuple(owners))
    found = halo_moves(layout, width)
    assert len(set(found)) == len(found)
    got = [(move.target, row) for move in found for row in range(move.start, move.stop)]
    needed = []
    for rank in range(5):
        first, last = layout.range_of(rank)
        around = set(range(first - width, last + width)) - set(range(first, last))
        needed += [(rank, row) for row in range(rows) if first < last and row in around]
    assert sorted(got) == sorted(needed)
    for move in found:
        first, last = layout.range_of(move.source)
        assert first <= move.start < move.stop <= last


@pytest.mark.parametrize("root", [0, 1, 2])
def test_gather_at_any_root(root):
    processes = resize_to_three()
    found = together(processes, lambda process: process.array.gather(root))
    assert [part is not None for part in found] == [rank == root for rank in range(3)]
    assert found[root].tobytes() == whole((7, 2), "f8").tobytes()
    found[root][:] = -1
    check(processes, (7, 2), "f8")


def resize_to_three():
    processes = start(2, (7, 2))
    check(processes, (7, 2), "f8")
    return resize(processes, [1, 2, 3], 2)


def test_a_new_array_has_a_balanced_block_of_zeros_everywhere():
    world = FakeWorld(3)
    arrays = [Process((8, 2), "f4", FakeRanks(world, rank)).array for rank in range(3)]
    assert [(a.start, a.stop) for a in arrays] == [(0, 2), (2, 5), (5, 8)]
    assert all(a.local.dtype == np.float32 and not a.local.any() for a in arrays)
    assert arrays[0].row_bytes == 8


def test_ranks_that_change_nothing_move_nothing():
    processes = start(3, (10,))
    check(processes, (10,), "f8")
    before = [process.array.local.copy() for process in processes]
    after = resize(processes, [0, 1, 2], 0)
    assert [p.array.local.tolist() for p in after] == [rows.tolist() for rows in before]
    assert after[0].array.layout.owners == (0, 1, 2)


def test_a_newcomer_has_no_rows_until_it_joins():
    array = Process((8, 2), "f4").array
    assert array.local.shape == (0, 2)
    assert (array.start, array.stop) == (0, 0)


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [lambda a: a.halo(), lambda a: a.gather()])
def test_a_newcomer_cannot_use_it_before_it_joins(use):
    with pytest.raises(ArrayError, match="array 'u': this rank has not joined"):
        use(Process((8,), "f4").array)


@pytest.mark.parametrize("shape", [(), (-1,), (3, -2)])
def test_shapes_that_make_no_sense(shape):
    with pytest.raises(ArrayError, match="array 'u': the shape"):
        Process(shape, "f4")


def test_objects_cannot_move():
    with pytest.raises(ArrayError, match="Python objects"):
        Process((3,), object)


def test_a_negative_halo():
    with pytest.raises(ArrayError, match="a halo of -1 rows"):
        start(1, (3,))[0].array.halo(-1)


@pytest.mark.parametrize("root", [-1, 2])
def test_a_root_that_is_not_there(root):
    processes = start(2, (3,))
    with pytest.raises(ArrayError, match=f"array 'u': there is no rank {root} to gather on"):
        together(processes, lambda process: process.array.gather(root))


def test_an_array_of_another_generation():
    (process,) = start(1, (3,))
    process.ranks = FakeRanks(FakeWorld(2), 0)
    for use in (process.array.halo, process.array.gather):
        with pytest.raises(ArrayError, match="does not belong to this generation"):
            use()


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 2), "f8"), ((3, 2), "f4"), ((3, 2, 1), "f8"), ((3,), "f8"), ((3, 2), ">f8")]
)
def test_newcomers_must_make_the_same_array(shape, dtype):
    form = start(2, (3, 2))[0].array.form()
    with pytest.raises(ArrayError, match=r"array 'u' is .* on the members: newcomers must make the same arrays"):
        Process(shape, dtype).array.adopt(form, 2)
