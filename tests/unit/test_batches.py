"""Batches: what comes ahead of time is what would have come without, and nobody's array is written over."""

from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import pytest

from hpc_elastic.errors import ConfigError, ShardError, StepError
from hpc_elastic.model import whole
from hpc_elastic.partition import blocks
from hpc_elastic.runtime import batches
from hpc_elastic.runtime.batches import Batches
from hpc_elastic.runtime.step import Batch, without_work
from hpc_elastic.sampler import Order
from hpc_elastic.shards import open_shards, write_shard

N, LEAVES, SIZE = 100, 4, 24
LIMIT_S = 10
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 5, 3), dtype=np.uint8)
LABELS = np.arange(N)


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "a.h5", {"image": IMAGES, "label": LABELS})
    with open_shards(tmp_path) as opened:
        yield opened


@pytest.fixture(params=["ahead", "in time"])
def ahead(request, monkeypatch):
    monkeypatch.setattr(batches, "WORTH_S", -1.0 if request.param == "ahead" else 1e9)
    return request.param == "ahead"


def steps(epochs=2):
    """Return all steps."""
    every = [(epoch, start) for epoch in range(epochs) for start in range(0, N, SIZE)]
    return [Batch(epoch, number, start, min(start + SIZE, N)) for number, (epoch, start) in enumerate(every)]


def shares(interval):
    found = [step.share(interval, LEAVES) for step in steps()]
    return zip(found, [*found[1:], None], strict=True)


def take(made, share, following=None):
    """Return what a step takes, as `Step` does it."""
    found = made.take(share)
    if made.slow and following is not None:
        made.begin(following)
    return found


def check(order, share, found):
    assert [micro.index for micro in found] == [index for index, *_ in share.cuts]
    for micro, (_, start, stop) in zip(found, share.cuts, strict=True):
        samples = order.take(share.epoch, share.first + start, share.first + stop)
        np.testing.assert_array_equal(micro.samples, samples)
        image, label = micro
        np.testing.assert_array_equal(image, IMAGES[samples])
        np.testing.assert_array_equal(label, samples)
        assert micro["label"] is label


@pytest.mark.parametrize("interval", [(0, 4), (1, 2), (2, 4)])
def test_all_steps(shards, ahead, interval):
    order = Order(N, 3)
    made = Batches(shards, order)
    for share, following in shares(interval):
        check(order, share, take(made, share, following))
        assert (made._ahead is not None) == (ahead and following is not None)
    made.close()


@pytest.mark.usefixtures("ahead")
def test_another_interval_than_was_expected(shards):
    order = Order(N, 3)
    made = Batches(shards, order)
    intervals = [(0, 4), (0, 2), (1, 2), (3, 4), (0, 4)]
    for number, step in enumerate(steps()):
        share = step.share(intervals[number % 5], LEAVES)
        check(order, share, take(made, share, share))
    made.close()


def test_what_was_not_expected_waits_for_what_was(shards, monkeypatch):
    """Both would fill the same arrays."""
    gather, running = shards.gather, []

    def slow(samples, out=None):
        running.append(samples)
        assert len(running) == 1
        time.sleep(0.02)
        running.pop()
        return gather(samples, out)

    monkeypatch.setattr(shards, "gather", slow)
    order = Order(N, 3)
    made = Batches(shards, order)
    for (share, following), _ in zip(shares((0, 2)), range(5), strict=False):
        made.begin(following)
        time.sleep(0.01)
        check(order, share, made.take(share))
    made.close()


@pytest.mark.usefixtures("ahead")
def test_arrays_that_are_held_stay_as_they_are(shards):
    order = Order(N, 3)
    made = Batches(shards, order)
    held = [(share, take(made, share, following)) for share, following in shares((0, 2))]
    for share, found in held:
        check(order, share, found)
    made.close()


def test_not_more_batches_than_needed_are_kept(shards):
    made = Batches(shards, Order(N, 3))
    held = [take(made, share)[0]["label"] for share, _ in shares((0, 4))]
    assert len(made._batches) == batches.KEPT < len(held)
    made.close()


@pytest.mark.usefixtures("ahead")
def test_arrays_of_others_are_not_filled():
    """A set may return parts of what it has."""

    class Parts(Own):
        reads_ahead = True

        def gather(self, samples, out=None):
            assert out is None
            start = int(samples[0])
            return {"image": IMAGES[start : start + len(samples)]}

    made = Batches(Parts(), Order(N, 3, shuffle=False))
    before = IMAGES.copy()
    for share, following in shares((0, 4)):
        take(made, share, following)
    np.testing.assert_array_equal(IMAGES, before)
    made.close()


def test_arrays_are_filled_again(shards, ahead):
    order = Order(N, 3)
    made = Batches(shards, order)
    memory = []
    for share, following in shares((0, 4)):
        found = take(made, share, following)
        memory.append(found[0]["image"].base.ctypes.data)
        del found
    assert len(set(memory)) <= (2 if ahead else 1)
    assert not any(address % mmap.PAGESIZE for address in memory)  # so that TensorFlow need not copy it
    made.close()


def test_the_next_one_is_there_when_it_is_asked_for(shards, monkeypatch):
    monkeypatch.setattr(batches, "WORTH_S", 0.01)
    gather, threads, reading = shards.gather, [], threading.Event()
    reading.set()

    def slow(samples, out=None):
        assert reading.wait(LIMIT_S)
        time.sleep(0.05)
        threads.append(threading.current_thread())
        return gather(samples, out)

    monkeypatch.setattr(shards, "gather", slow)
    made = Batches(shards, Order(N, 3))
    (first, second), (_, third), *_ = shares((0, 4))
    take(made, first, second)
    made._ahead[1].result(LIMIT_S)
    reading.clear()
    take(made, second, third)  # though nothing can be read
    reading.set()
    made.close()
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


def test_what_fails_ahead_is_raised_in_its_turn(shards, ahead, monkeypatch):
    made = Batches(shards, Order(N, 3))
    (first, second), (_, third), *_ = shares((0, 4))
    gather = shards.gather

    def fail(_samples, _out=None):
        raise ShardError("damaged")

    take(made, first)
    monkeypatch.setattr(shards, "gather", fail)
    if ahead:
        made.begin(second)
    with pytest.raises(ShardError, match="damaged"):
        take(made, second, third)
    monkeypatch.setattr(shards, "gather", gather)
    check(Order(N, 3), second, take(made, second, third))
    made.close()


class Own:
    """Data of the user's own, which knows of no thread."""

    chunk_samples = None
    thread = None

    def __len__(self):
        return N

    def gather(self, samples, out=None):
        assert out is None
        assert threading.current_thread() is threading.main_thread()
        return {"image": IMAGES[samples], "label": LABELS[samples]}


@pytest.mark.usefixtures("ahead")
def test_data_of_ones_own_is_read_in_time():
    order = Order(N, 3)
    made = Batches(Own(), order)
    for share, following in shares((0, 4)):
        check(order, share, take(made, share, following))
    made.close()


@pytest.mark.usefixtures("ahead")
def test_decoding_has_the_same_random_numbers_on_any_rank(shards):
    def decode(fields, random):
        noise = random.integers(0, 256, fields["image"].shape, np.uint8)
        return {"image": fields["image"] ^ noise, "noise": noise}

    order = Order(N, 3)
    found = {}
    for intervals in ([(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]):
        whole = []
        for interval in intervals:
            made = Batches(shards, order, decode)
            for share, following in shares(interval):
                for micro in take(made, share, following):
                    np.testing.assert_array_equal(micro["image"] ^ micro["noise"], IMAGES[micro.samples])
                    whole.append((share.step, micro.index, micro["image"].tobytes()))
            made.close()
        found[len(intervals)] = sorted(whole)
    assert found[1] == found[2] == found[4]
    noises = [noise for _, _, noise in found[1]]
    assert len(set(noises)) == len(noises)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda _fields, _: None, "a dict of arrays, not None"),
        (lambda _fields, _: {}, "a dict of arrays, not {}"),
        (lambda fields, _: {"image": fields["image"][1:]}, r"the 6 samples .* 'image' is an array \[5, 5, 3\]"),
        (lambda _fields, _: {"image": np.float32(3)}, r"'image' is an array \[\]"),
        (lambda _fields, _: {"image": 3}, "'image' is 3"),
    ],
)
def test_what_decoding_must_return(shards, wrong, says):
    made = Batches(shards, Order(N, 3), wrong)
    (share, _), *_ = shares((0, 4))
    with pytest.raises(StepError, match=says):
        made.take(share)
    made.close()


def test_closing_does_not_wait_for_all_that_is_decoded_ahead(shards):
    begun, goes_on, decoded = threading.Event(), threading.Event(), []

    def slow(fields, _random):
        begun.set()
        decoded.append(goes_on.wait(10))
        return fields

    made = Batches(shards, Order(N, 3), slow)
    (share, _), *_ = shares((0, 4))
    made.begin(share)
    assert begun.wait(10)
    threading.Timer(0.05, goes_on.set).start()
    made.close()
    assert decoded == [True]  # the one under way, and no other


def test_whole_numbers():
    assert type(whole("job.loop: n", np.int32(3))) is int
    for odd in (2.5, "3", None):
        with pytest.raises(ConfigError, match=f"job.loop: n must be an integer, not {odd!r}"):
            whole("job.loop: n", odd)


def test_no_thread_to_read_ahead(shards, monkeypatch):
    """As when the user has as many as there may be: they are made in time, and ahead again when there can be one."""
    monkeypatch.setattr(batches, "WORTH_S", -1.0)
    order = Order(N)
    made, threads, gather = Batches(shards, order), set(), shards.gather

    def noted(*given):
        threads.add(threading.current_thread())
        return gather(*given)

    monkeypatch.setattr(shards, "gather", noted)
    for number, (share, following) in enumerate(shares((0, LEAVES))):
        with monkeypatch.context() as patch:
            if number < 3:
                patch.setattr(threading.Thread, "start", no_thread)
            check(order, share, take(made, share, following))
        assert number >= 3 or threads == {threading.current_thread()}
    made.close()
    assert len(threads) == 2


def no_thread(_):
    raise RuntimeError("can't start new thread")


STEP = " nothing to do, since a step has 4 microbatches: raise microbatches, or lower max to 4"
BATCH = " nothing to do, since a batch of 4 ranks has 3 samples in 8 microbatches: take larger batches"


@pytest.mark.parametrize(
    ("size", "leaves", "ranks", "said"),
    [
        (24, 4, 4, ""),
        (24, 4, 1, ""),
        (4, 4, 4, ""),
        (24, 4, 5, "1 of 5 ranks has" + STEP),
        (24, 4, 9, "5 of 9 ranks have" + STEP),
        (3, 8, 2, ""),
        (3, 8, 4, "1 of 4 ranks has" + BATCH),
    ],
)
def test_ranks_without_work(size, leaves, ranks, said):
    """It is said of just those that have no sample."""
    assert without_work(size, leaves, ranks) == said
    idle = sum(not Batch(0, 0, 0, size).share(interval, leaves).cuts for interval in blocks(leaves, ranks))
    assert said.startswith(f"{idle} of" if idle else "")
    assert bool(idle) == bool(said)
