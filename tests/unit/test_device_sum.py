"""The sum of GPU arrays, with a fake CuPy: the bits of NumPy arrays, staged and by NCCL, and what happens on a loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic import reduce
from hpc_elastic.arrays import gpu, nccl
from hpc_elastic.comm.waiting import Lost
from hpc_elastic.errors import ArrayError, StepError
from hpc_elastic.reduce.device import NoLine, Staged

from . import fake_cupy
from .test_reduce import FakeRanks, FakeWorld, bits, mixed, noise, use

LEAVES = 7


@pytest.fixture(params=["staged", "nccl"])
def way(request, monkeypatch):
    fake_cupy.install(monkeypatch, devices=4, with_nccl=request.param == "nccl")
    return request.param


def on_gpu(tree, which=lambda _name: True):
    """A structure with those arrays on the GPU whose key in it is `which`; numbers stay as they are."""
    if isinstance(tree, dict):
        return {key: on_gpu(value, which) if which(key) else value for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_gpu(value, which) for value in tree)
    return gpu.library().asarray(tree)


def fetched(tree):
    """The structure with NumPy arrays, and where each was."""
    if isinstance(tree, dict):
        return {key: fetched(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(fetched(value) for value in tree)
    return tree if isinstance(tree, np.ndarray) else tree.get()


def sums(size, empties, values, hosts=1, exact=True, leaves=LEAVES):
    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(leaves, lambda: ranks, exact=exact)
        found = []
        for step, empty in enumerate(empties):
            tree, metrics = use(total, step, leaves, empty, values)
            found.append((bits(fetched(tree)), metrics))
        return found

    return FakeWorld(size, hosts).run(body)


EMPTIES = [set(), {1, 4}, {0, 1, 2}, set()]


@pytest.mark.parametrize("small", [0, 1 << 15])
@pytest.mark.parametrize("where", ["all", "some"])
def test_the_bits_are_those_of_numpy_arrays(way, where, small, monkeypatch):
    monkeypatch.setattr(reduce, "SMALL_BYTES", small)
    (expected,) = sums(1, EMPTIES, mixed)

    def values(step, leaf):
        return on_gpu(mixed(step, leaf), (lambda _: True) if where == "all" else (lambda key: key in ("b", "none")))

    for size in (1, 2, 3, 4):
        for hosts in range(1, min(size, 2) + 1):
            assert sums(size, EMPTIES, values, hosts) == [expected] * size, (size, hosts)
    made = fake_cupy.NcclCommunicator.made
    assert len(made) == (0 if way == "staged" else 2 + 2 + 3 + 3 + 4 + 4)


@given(st.integers(4, 12), st.data())
def test_the_bits_do_not_depend_on_where_arrays_are(leaves, data):
    empty = data.draw(st.sets(st.integers(0, leaves - 1), max_size=leaves - 1))
    far = data.draw(st.sets(st.sampled_from(["w", "rest", "b", "none"])))
    with pytest.MonkeyPatch.context() as patch:
        fake_cupy.install(patch, devices=4, with_nccl=data.draw(st.booleans()))
        patch.setattr(reduce, "SMALL_BYTES", data.draw(st.sampled_from([0, 300, 1 << 15])))
        size, hosts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        (expected,) = sums(1, [empty, set()], mixed, leaves=leaves)

        def values(step, leaf):
            return on_gpu(mixed(step, leaf), far.__contains__)

        assert sums(size, [empty, set()], values, min(size, hosts), leaves=leaves) == [expected] * size


@pytest.mark.usefixtures("way")
def test_results_come_back_where_the_arrays_were():
    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(4, lambda: ranks)
        values = lambda step, leaf: on_gpu(mixed(step, leaf), lambda key: key == "w")  # noqa: E731
        tree, _ = use(total, 0, 4, set(), values)
        return type(tree["w"]), tree["w"].device.id, type(tree["b"])

    for size in (1, 2):
        assert FakeWorld(size).run(body) == [(fake_cupy.ndarray, rank, np.ndarray) for rank in range(size)]


@pytest.mark.usefixtures("way")
def test_large_ones():
    def near(step, leaf):
        return [noise(step, leaf, (40_001,), "f4"), noise(step, leaf, (9,), "f8")]

    (expected,) = sums(1, [set(), {2}], near)
    for size in (2, 4):
        assert sums(size, [set(), {2}], lambda *which: on_gpu(near(*which))) == [expected] * size


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("hosts", [1, 2])
def test_in_the_order_of_the_library(hosts):
    def near(step, leaf):
        return [noise(step, leaf, (1001,), "f8"), noise(step, leaf, (5,), "i8")]

    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(4, lambda: ranks, exact=False)
        tree, metrics = use(total, 0, 4, {3}, lambda *which: on_gpu(near(*which)))
        return *fetched(tree), metrics

    def expected(ranks):
        tree, metrics = use(reduce.Sum(4, lambda: ranks), 0, 4, {3}, near)
        return *tree, metrics

    ((floats, integers, metrics),) = FakeWorld(1).run(expected)
    for size in (2, 3, 4):  # with 4 of them, the last has nothing to give
        for got, whole, told in FakeWorld(size, hosts).run(body):
            np.testing.assert_allclose(got, floats, rtol=1e-12)
            assert (whole == integers).all()
            assert told == pytest.approx(metrics)


def test_what_nccl_has_no_sum_of(monkeypatch):
    """All are told, before anything is under way, and the next sum is right."""
    fake_cupy.install(monkeypatch, devices=2, with_nccl=True)

    def body(ranks):
        gpu.use(ranks.rank)
        for dtype, right in (("i2", False), ("f4", True)):
            total = reduce.Sum(2, lambda: ranks, exact=False)
            total.add(ranks.rank, on_gpu(np.ones(3, dtype)), {}, 1.0)
            if right:
                return total.reduce(set())[0].get().tolist()
            with pytest.raises(ArrayError, match="NCCL has no sum of int16: leave exact=True"):
                total.exchange(set())
        return None

    assert FakeWorld(2).run(body) == [[2, 2, 2]] * 2


@pytest.mark.usefixtures("way")
def test_a_newcomer_may_have_no_share_of_its_first_step():
    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(4, lambda: ranks)
        values = lambda *which: on_gpu(mixed(*which))  # noqa: E731
        found = []
        for step, empty in enumerate([{2, 3}, set()]):
            tree, metrics = use(total, step, 4, empty, values)
            found.append((bits(fetched(tree)), metrics))
        return found

    (alone,) = FakeWorld(1).run(body)
    for size in (2, 4):
        assert FakeWorld(size).run(body) == [alone] * size


@pytest.mark.usefixtures("way")
def test_ranks_with_arrays_in_different_places_are_told():
    """On one host they all meet in its memory first, so that nobody waits for messages that don't come."""

    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(2, lambda: ranks)
        total.add(ranks.rank, np.ones(3) if ranks.rank else on_gpu(np.ones(3)), {}, 1.0)
        with pytest.raises(ArrayError, match="did not give arrays alike"):
            total.exchange(set())
        total.add(ranks.rank, np.ones(3) if ranks.rank else on_gpu(np.ones(3)), {}, 1.0)  # nothing of before is left

    FakeWorld(2).run(body)


@pytest.mark.usefixtures("way")
def test_a_change_of_place_is_refused():
    total = reduce.Sum(2, lambda: FakeRanks(FakeWorld(1), 0))
    total.add(0, {"a": on_gpu(np.zeros(2))}, {}, 0.5)
    with pytest.raises(StepError, match="whether on a GPU, must stay the same"):
        total.add(1, {"a": np.zeros(2)}, {}, 0.5)


@pytest.mark.usefixtures("way")
def test_memory_is_used_again():
    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(8, lambda: ranks)
        lengths = []
        for step in range(8):
            values = lambda *which: on_gpu(mixed(*which))  # noqa: E731
            if step % 3 == 2:  # as if another rank had been lost meanwhile
                for leaf in range(*total.interval):
                    total.add(leaf, values(step, leaf), {"loss": 1.0, "hits": 1.0}, 1.0)
                total.drop()
            use(total, step, 8, set(), values)
            slots = total._parts[1]._slots
            lengths.append((len(slots._slots), len(slots.stage._slots)))
        return lengths

    for size in (1, 2, 4):
        for lengths in FakeWorld(size).run(body):
            assert len(set(lengths[2:])) == 1, lengths


def test_what_is_staged_is_one_copy_for_each_partial_sum(monkeypatch):
    """However many arrays there are, and however many microbatches."""
    fake_cupy.install(monkeypatch, devices=4)

    def body(ranks):
        total = reduce.Sum(8, lambda: ranks)
        use(total, 0, 8, set(), lambda *which: on_gpu(mixed(*which)))
        assert not fake_cupy.get_current_stream()._todo, "the host's memory is others' again, and nothing reads it any more"

    FakeWorld(2).run(body)
    kinds = [kind for kind, _ in fake_cupy.LOG]
    assert kinds.count("fetch") == kinds.count("put") == 2
    assert kinds.index("fetch") < kinds.index("wait") < kinds.index("put")


def test_what_others_may_still_read_is_left_alone(monkeypatch):
    """After a small sum: who is slow reads it until the next one has been done."""
    fake_cupy.install(monkeypatch, devices=2)

    def body(ranks):
        gpu.use(ranks.rank)
        total, before = reduce.Sum(2, lambda: ranks), None
        for _ in range(4):
            total.add(ranks.rank, on_gpu(np.ones(3)), {}, 1.0)
            total.exchange(set())
            (held,) = total._parts[1]._transport._held
            assert held.offset != before
            before = held.offset

    FakeWorld(2).run(body)


# --- the line ---------------------------------------------------------------------------------------------------------


def test_where_nccl_fails_on_one_rank_all_go_by_the_host(monkeypatch, caplog):
    fake_cupy.install(monkeypatch, devices=4, with_nccl=True)
    monkeypatch.setattr(fake_cupy.NcclCommunicator, "fails", (0, 1))
    (expected,) = sums(1, EMPTIES, mixed)
    assert sums(2, EMPTIES, lambda *which: on_gpu(mixed(*which))) == [expected] * 2
    assert "NCCL failed on rank 0: unhandled system error" in caplog.text


def test_one_line_serves_all_sums_of_a_generation(monkeypatch):
    fake_cupy.install(monkeypatch, devices=2, with_nccl=True)

    def body(ranks):
        gpu.use(ranks.rank)
        for length in (3, 4, 5):
            total = reduce.Sum(2, lambda: ranks)
            total.add(ranks.rank, on_gpu(np.ones(length)), {}, 1.0)
            assert total.reduce(set())[0].get().tolist() == [2] * length
        assert isinstance(ranks.kept["nccl"], nccl.Line)

    FakeWorld(2).run(body)
    assert len(fake_cupy.NcclCommunicator.made) == 2
    assert {comm.device for comm in fake_cupy.NcclCommunicator.made} == {0, 1}


def test_ranks_that_share_a_gpu_do_not_try(monkeypatch):
    fake_cupy.install(monkeypatch, devices=1, with_nccl=True)

    def body(ranks):
        total = reduce.Sum(2, lambda: ranks)
        total.add(ranks.rank, on_gpu(np.ones(3)), {}, 1.0)
        assert total.reduce(set())[0].get().tolist() == [2] * 3
        assert isinstance(ranks.kept["nccl"], NoLine)
        assert isinstance(total._parts[1]._transport, Staged)

    FakeWorld(2).run(body)
    assert not fake_cupy.NcclCommunicator.made


@pytest.mark.parametrize("exact", [True, False])
def test_a_loss_ends_the_line(monkeypatch, exact):
    """The stream of the other ranks would wait for the lost one for ever."""
    fake_cupy.install(monkeypatch, devices=2, with_nccl=True)

    def body(ranks):
        gpu.use(ranks.rank)
        total = reduce.Sum(2, lambda: ranks, exact=exact)
        total.add(ranks.rank, on_gpu(np.ones(3)), {}, 1.0)
        total.exchange(set())
        total.add(ranks.rank, on_gpu(np.ones(3)), {}, 1.0)
        monkeypatch.setattr(gpu, "finished", lambda: lambda: False)  # so it looks when NCCL waits

        def lost():
            raise Lost(frozenset({7}))

        ranks.world.barrier.wait()
        ranks.watch.check = lost
        with pytest.raises(Lost, match="process 7"):
            total.exchange(set())
        total.drop()

    monkeypatch.setattr(reduce, "SMALL_BYTES", 1 << 15)
    FakeWorld(2).run(body)
    assert [comm.aborted for comm in fake_cupy.NcclCommunicator.made] == [True, True]


def test_every_two_ranks_are_connected_at_the_start(monkeypatch):
    """Else NCCL would wait where nobody can leave."""
    fake_cupy.install(monkeypatch, devices=3, with_nccl=True)
    sums(3, [set()], lambda *which: on_gpu(mixed(*which)))
    for comm in fake_cupy.NcclCommunicator.made:
        assert sorted(comm.sent[:2]) == [(rank, 1) for rank in range(3) if rank != comm.rank]


@pytest.mark.usefixtures("way")
def test_wire_is_for_the_host():
    total = reduce.Sum(1, lambda: None, wire="bfloat16")
    with pytest.raises(ArrayError, match="wire is for arrays on the host"):
        total.add(0, on_gpu([np.ones(3, np.float32)]), {}, 1.0)
