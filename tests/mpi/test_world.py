"""Collectives of a world, and what is built on them, on as many ranks as there are."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from hpc_elastic.comm import waiting
from hpc_elastic.comm.collectives import LARGE_BYTES, PIECE_BYTES
from hpc_elastic.comm.user import UserComm
from hpc_elastic.comm.waiting import LeftOut, Watch
from hpc_elastic.comm.world import World, vendor
from hpc_elastic.model import Generation, Move
from hpc_elastic.partition import block
from hpc_elastic.redistribute import DistributedArray
from hpc_elastic.reduce import SMALL_BYTES, Sum
from hpc_elastic.state import Registry

SIZES = [1, 7, SMALL_BYTES // 4, 100_003, LARGE_BYTES // 4 + 1]


def test_tell(world):
    for data in (b"", b"x", bytes(range(256)) * 1000):
        assert world.tell(data if world.rank == 0 else None) == data


def test_gather_all(world):
    assert world.gather_all(bytes([world.rank]) * world.rank) == [bytes([r]) * r for r in range(world.size)]


def test_fill(world):
    array = np.arange(12.0).reshape(3, 4) if world.rank == 0 else np.empty((3, 4))
    world.fill(array)
    np.testing.assert_array_equal(array, np.arange(12.0).reshape(3, 4))


def test_long_messages_go_in_pieces(world):
    length = PIECE_BYTES // 4 + 11
    array = np.arange(length, dtype=np.uint64) if world.rank == 0 else np.empty(length, np.uint64)
    world.fill(array)
    assert (array == np.arange(length)).all()
    whole = np.empty(length * world.size, np.uint64)
    world.all_parts(array + np.uint64(world.rank), whole, [length] * world.size)
    for rank, part in enumerate(whole.reshape(world.size, length)):
        assert (part == np.arange(length) + rank).all()


@pytest.mark.parametrize(("ends_s", "pauses"), [([0.06] * 10, False), ([0.6], True)], ids=["many pieces", "one"])
def test_pauses_begin_when_nothing_has_come(ends_s, pauses, monkeypatch):
    """Not when all together take long: with pauses, MPICH moves large messages slowly."""
    now, slept, left = [0.0], [], list(ends_s)

    def poll(_requests):
        now[0] += 0.001
        left[0] -= 0.001
        if left[0] > 0:
            return []
        del left[0]
        return [0] if left else None

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds
        left[0] -= seconds

    monkeypatch.setattr(waiting, "MPI", SimpleNamespace(Request=SimpleNamespace(Testsome=poll)))
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    Watch().finish([], waiting.busy(100 << 20))
    assert bool(slept) == pauses


def test_exchange_around(world):
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    got = np.empty(5)
    world.exchange([(Move(world.rank, right, 0, 5), np.full(5, float(world.rank)))], [(Move(left, world.rank, 0, 5), got)])
    assert (got == left).all()


def gradients(leaf, length):
    """What microbatch `leaf` contributes, whoever computes it."""
    random = np.random.default_rng(leaf)
    return [random.standard_normal((length, 1)).astype(np.float32), random.standard_normal(3)]


class One:
    """A world of one rank, for the reference."""

    rank, size = 0, 1


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("leaves", [3, 13, 16])
def test_sum_has_the_bits_of_one_rank(length, leaves, world):
    own, alone = Sum(leaves, lambda: world), Sum(leaves, lambda: One)
    for empty in (set(), {0, 2}, {leaves - 1}):
        for leaf in set(range(leaves)) - empty:
            alone.add(leaf, gradients(leaf, length), {"loss": leaf / 7}, 1 / leaves)
        for leaf in sorted(set(range(*block(leaves, world.size, world.rank))) - empty):
            own.add(leaf, gradients(leaf, length), {"loss": leaf / 7}, 1 / leaves)
        (a, b), metrics = own.reduce(empty)
        (c, d), reference = alone.reduce(empty)
        assert a.tobytes() == c.tobytes()
        assert b.tobytes() == d.tobytes()
        assert metrics == reference


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 100])
def test_halo_and_gather(rows, world):
    array = DistributedArray("a", (rows, 3), np.float64, lambda: world)
    array.local[:] = np.arange(array.start, array.stop)[:, None]
    for width in (0, 1, 2, 40):
        before, after = array.halo(width)
        if len(array.local):
            np.testing.assert_array_equal(before[:, 0], np.arange(max(0, array.start - width), array.start))
            np.testing.assert_array_equal(after[:, 0], np.arange(array.stop, min(rows, array.stop + width)))
    whole = array.gather(root=world.size - 1)
    assert (whole is not None) == (world.rank == world.size - 1)
    if whole is not None:
        np.testing.assert_array_equal(whole[:, 2], np.arange(rows))


def test_state_travels_whole(world):
    big = np.arange(100_000, dtype=np.float32)
    state = {"big": big if world.rank == 0 else np.zeros_like(big), "step": 7 if world.rank == 0 else 0}
    registry = Registry()
    registry.add({"state": state})
    if world.rank == 0:
        registry.send(world)
    else:
        registry.receive(world)
    np.testing.assert_array_equal(state["big"], big)
    assert state["step"] == 7


def test_users_calls_are_marked(world):
    """While a call of the user's own lasts, the rank knows with whom it may be stuck."""
    seen = []

    @contextlib.contextmanager
    def mark(members):
        seen.append(tuple(members))
        yield

    members = world.generation.members
    comm = UserComm.marked(world.comm.Dup(), mark, members)
    assert comm.allreduce(1) == world.size
    assert comm.size == comm.Get_size() == world.size
    assert len(seen) >= 2
    assert set(seen) == {members}
    total = np.zeros(1)
    comm.Allreduce(np.ones(1), total)
    assert total[0] == world.size
    other = comm.Dup()
    assert other.bcast(world.rank) == 0
    other.Free()
    comm.Free()


class Kept:
    """What belongs to a generation."""

    def __init__(self):
        self.closed = 0

    def close(self):
        self.closed += 1


def test_what_is_kept_ends_with_its_generation(world):
    own = World(world.comm.Dup(), world.generation, world.watch)
    kept = own.keep("it", Kept)
    assert own.keep("it", Kept) is kept
    assert own.keep("other", Kept) is not kept
    own.close()
    assert kept.closed == 1


def test_survivors_come_together(world):
    """Without the last rank, which takes no part in it."""
    if world.size == 1 or vendor().shrinks:
        pytest.skip("needs two ranks, and on Open MPI a dead one")
    survivors = list(range(world.size - 1))
    if world.rank in survivors:
        members = world.generation.members[:-1]
        kept = world.keep("it", Kept)
        rebuilt = world.rebuild(survivors, Generation(5, members), 3)
        assert kept.closed == 1
        assert (rebuilt.rank, rebuilt.size) == (world.rank, len(survivors))
        assert rebuilt.gather_all(bytes([rebuilt.rank])) == [bytes([rank]) for rank in survivors]
        rebuilt.close()
    world.barrier()


def test_a_deaf_survivor_ends_itself(world):
    """It does not hear what it knows was sent: here since the other one says so before it has sent anything."""
    if world.size == 1 or vendor().shrinks:
        pytest.skip("needs two ranks, and MPICH")
    if world.rank == 1:
        with pytest.raises(LeftOut, match="heard nothing of what others sent it"):
            world._greet([0, 1], 7, lambda: True)
    world.barrier()
    if world.rank == 0:
        world._greet([0, 1], 7, lambda: True)
    world.barrier()


def test_a_call_apart(world):
    watch = Watch()
    assert watch.apart(lambda: world.comm.allreduce(1)) == world.size
    with pytest.raises(ZeroDivisionError):
        watch.apart(lambda: 1 // 0)
