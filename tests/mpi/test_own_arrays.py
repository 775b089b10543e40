"""Sums, broadcasts and gathers of the user's own arrays, on as many ranks as there are."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

import hpc_elastic as he
from hpc_elastic.comm.board import Board
from hpc_elastic.errors import ArrayError, JobError
from hpc_elastic.model import Member
from hpc_elastic.reduce import SMALL_BYTES, network
from hpc_elastic.runtime.collective import SUMS, Collective

from ..unit import fake_cupy

DTYPES = ["f4", "f8", "f2", bfloat16, "i1", "i4", "i8", "u2", "?"]
LENGTHS = [0, 1, 1000, SMALL_BYTES]


@pytest.fixture(params=[1, 2], ids=["one host", "two hosts"])
def collective(request, world, monkeypatch):
    """Return the collectives of ranks that are on so many hosts, as far as there are ranks."""
    made = Board(
        world, [Member(id=r, pid=m.pid, host=f"host{r % request.param}") for r, m in enumerate(world.generation.members)]
    )
    monkeypatch.setattr(world, "_board", made)
    return Collective(lambda: world)


def values(rank, shape, dtype):
    """Return what a rank gives; small numbers, so that no type overflows."""
    return (np.random.default_rng(rank).standard_normal(shape) * 9).astype(dtype)


def total(parts):
    """Add up neighbours first, as the tree does."""
    while len(parts) > 1:
        parts = [
            pair[0] if len(pair) == 1 else pair[0] + pair[1] for pair in (parts[i : i + 2] for i in range(0, len(parts), 2))
        ]
    return parts[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_that_of_the_tree(dtype, collective, world):
    for length in LENGTHS:
        for _ in range(3):
            mine = values(world.rank, length, dtype)
            before = mine.tobytes()
            found = collective.allreduce(mine)
            expected = total([values(rank, length, dtype) for rank in range(world.size)])
            assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
            assert mine.tobytes() == before
            found[:1] = 1  # it is the caller's own


def test_forms(collective, world):
    """Scalars, strides, read-only ones, and those of other byte order."""
    n = world.size
    whole = np.arange(24.0).reshape(4, 6)
    still = whole.copy()
    still.flags.writeable = False
    for array in (whole[::2, ::-3], whole.T, np.asfortranarray(whole), still, whole.astype(">f8"), np.float32(3), 5, [1, 2]):
        found = collective.allreduce(array)
        np.testing.assert_array_equal(found, np.asarray(array) * n)
        np.testing.assert_array_equal(collective.broadcast(array, n - 1), array)
        assert all(np.array_equal(part, array) for part in collective.allgather(array))
    assert collective.allreduce(5).dtype == np.int64


def test_into_an_array(collective, world):
    mine = np.full(7, world.rank + 1, np.float32)
    other = np.empty_like(mine)
    expected = world.size * (world.size + 1) / 2
    assert collective.allreduce(mine, other) is other
    assert collective.allreduce(mine, mine) is mine
    assert (other == expected).all()
    assert (mine == expected).all()
    with pytest.raises(ArrayError, match="must be alike"):
        collective.allreduce(mine, np.empty(7))


@pytest.mark.parametrize("wire", [None, "bfloat16", "float16"])
def test_many_buckets(wire, collective, world, monkeypatch):
    """More than are under way at a time, out of memory that is used again."""
    monkeypatch.setattr(network, "PIECE_BYTES", 4096)
    narrow = {"bfloat16": bfloat16, "float16": "f2", None: "f4"}[wire]
    for turn in range(3):
        parts = [values(10 * turn + rank, 100_003, "f4").astype(narrow) for rank in range(world.size)]
        found = collective.allreduce(values(10 * turn + world.rank, 100_003, "f4"), wire=wire)
        assert found.dtype == np.float32
        assert found.tobytes() == total(parts).astype("f4").tobytes()


@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "u1"])
def test_the_sum_of_the_library(dtype, collective, world):
    for length in LENGTHS:
        found = collective.allreduce(values(world.rank, length, dtype), exact=False)
        expected = sum(values(rank, length, dtype).astype("f8") for rank in range(world.size))
        assert found.dtype == dtype
        if np.dtype(dtype).kind == "f":
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [">f4", "?", bfloat16], ids=str)
def test_what_the_library_can_not_add_up(dtype, collective, world):
    if world.size == 1:
        pytest.skip("one rank asks no library")
    with pytest.raises(ArrayError, match="leave exact=True"):
        collective.allreduce(np.ones(3, dtype), exact=False)


def test_arrays_that_differ(collective, world):
    """Every rank is told, and the next sum is right."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    for mine in (np.ones(3 + world.rank), np.ones(3, "f4" if world.rank else "f8")):
        with pytest.raises(ArrayError, match="did not give arrays alike"):
            collective.allreduce(mine)
        assert collective.allreduce(np.ones(3)).tolist() == [world.size] * 3


def test_many_forms(collective, world):
    for _ in range(2):
        for length in range(SUMS + 3):
            assert collective.allreduce(np.ones(length + SMALL_BYTES // 8)).sum() == world.size * (length + SMALL_BYTES // 8)
    assert len(collective._sums) == SUMS


@pytest.mark.parametrize("dtype", [*DTYPES, "c16"], ids=str)
def test_broadcast_and_allgather(dtype, collective, world):
    for root in range(world.size):
        found = collective.broadcast(values(root, (3, 2), dtype) if world.rank == root else None, root)
        assert (found.dtype, found.tobytes()) == (np.dtype(dtype), values(root, (3, 2), dtype).tobytes())
    parts = collective.allgather(values(world.rank, (world.rank, 2), dtype))
    assert [part.shape for part in parts] == [(rank, 2) for rank in range(world.size)]
    assert all(part.tobytes() == values(rank, (rank, 2), dtype).tobytes() for rank, part in enumerate(parts))


@pytest.mark.parametrize("dtype", ["f4", "i8", "?"], ids=str)
def test_arrays_on_a_gpu(dtype, collective, world, monkeypatch):
    """All ranks on one, a fake: so they go through the memory of the host."""
    cupy = fake_cupy.install(monkeypatch, with_nccl=True)
    for length in LENGTHS:
        near = values(world.rank, length, dtype)
        far = cupy.asarray(near)
        found = collective.allreduce(far)
        assert isinstance(found, cupy.ndarray)
        assert found.get().tobytes() == collective.allreduce(near).tobytes()
        assert collective.allreduce(far, far) is far
        assert far.get().tobytes() == found.get().tobytes()
    if dtype != "?":
        np.testing.assert_allclose(collective.allreduce(far, exact=False).get(), collective.allreduce(near) * world.size)
    for root in range(world.size):
        found = collective.broadcast(cupy.asarray(values(root, (3, 2), dtype)) if world.rank == root else None, root)
        assert isinstance(found, cupy.ndarray)
        assert found.get().tobytes() == values(root, (3, 2), dtype).tobytes()
    mine = values(world.rank, (world.rank, 2), dtype)
    parts = collective.allgather(cupy.asarray(mine) if world.rank else mine)
    assert {type(part) for part in parts} == {cupy.ndarray if world.rank else np.ndarray}
    for rank, part in enumerate(parts):
        assert (part.get() if world.rank else part).tobytes() == values(rank, (rank, 2), dtype).tobytes()


def test_arrays_in_different_places(collective, world, monkeypatch):
    cupy = fake_cupy.install(monkeypatch)
    far = cupy.asarray(np.ones(3))
    with pytest.raises(ArrayError, match="must be alike"):
        collective.allreduce(far, np.ones(3))
    if world.size > 1:
        for exact in (True, False):
            with pytest.raises(ArrayError, match="did not give arrays alike"):
                collective.allreduce(far if world.rank else np.ones(3), exact=exact)
    assert collective.allreduce(far).get().tolist() == [world.size] * 3


def test_what_is_refused(collective, world):
    for wrong in ("text", [object()], np.zeros(2, "M8[s]"), None):
        for call in (collective.allreduce, collective.allgather, lambda array: collective.broadcast(array, world.rank)):
            with pytest.raises(ArrayError, match="number"):
                call(wrong)
    for root in (-1, world.size):
        with pytest.raises(ArrayError, match="there are ranks 0 to"):
            collective.broadcast(np.ones(2), root)


def test_without_a_job():
    for call in (he.allreduce, he.broadcast, he.allgather):
        with pytest.raises(JobError, match="no job is running"):
            call(np.ones(2))
