"""The order of the samples: a bijection in each epoch, the same for whoever asks for whatever part of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.sampler import Order, microbatches, stable_order, steps_per_epoch, without_samples

orders = st.builds(
    Order,
    samples=st.integers(0, 300),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    chunk=st.none() | st.integers(1, 40),
    window=st.integers(1, 20),
)
epochs = st.integers(0, 1000)


def whole(order, epoch=0):
    return order.take(epoch, 0, order.samples)


@given(orders, epochs)
def test_each_sample_exactly_once(order, epoch):
    taken = whole(order, epoch)
    assert taken.dtype == np.int64
    assert sorted(taken.tolist()) == list(range(order.samples))
    if not order.shuffle:
        assert taken.tolist() == list(range(order.samples))


@given(orders, epochs, st.data())
def test_slices_agree_with_the_whole(order, epoch, data):
    expected = whole(order, epoch)
    for _ in range(3):
        start = data.draw(st.integers(0, order.samples))
        stop = data.draw(st.integers(start, order.samples))
        part = order.take(epoch, start, stop)
        assert part.dtype == np.int64
        assert part.tolist() == expected[start:stop].tolist()


@given(st.integers(200, 300), st.none() | st.integers(1, 40), st.integers(0, 2**64 - 1), epochs)
def test_epochs_and_seeds_differ(samples, chunk, seed, epoch):
    order = Order(samples, seed, chunk=chunk)
    assert whole(order, epoch).tolist() != whole(order, epoch + 1).tolist()
    assert whole(order, epoch).tolist() != whole(Order(samples, seed ^ 1, chunk=chunk), epoch).tolist()
    assert whole(order, epoch).tolist() != list(range(samples))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**64 - 1))
def test_windows_stay_within_their_chunks(samples, chunk, window, seed):
    taken = whole(Order(samples, seed, chunk=chunk, window=window)) // chunk
    position, seen = 0, set()
    while position < samples:
        # A window is over when all samples of its chunks are out; no chunk comes back after that.
        chunks, left = set(), 0
        for number in taken[position:]:
            if number not in chunks:
                if left == 0 and chunks and len(chunks) == window:
                    break
                chunks.add(int(number))
                left += min(chunk, samples - int(number) * chunk)
            left -= 1
            position += 1
        assert left == 0
        assert len(chunks) <= window
        assert not chunks & seen
        seen |= chunks
    assert len(seen) == -(-samples // chunk)


def test_samples_of_a_window_are_mixed():
    taken = whole(Order(160, chunk=10, window=4))
    for start in range(0, 160, 40):
        chunks = taken[start : start + 40] // 10
        assert len(set(chunks.tolist())) == 4
        assert len(set(chunks[:10].tolist())) > 1
    windows = [tuple(sorted(set((taken[start : start + 40] // 10).tolist()))) for start in range(0, 160, 40)]
    assert (0, 1, 2, 3) not in windows  # the chunks are mixed as well


def test_every_sample_can_come_first():
    firsts = [int(Order(10, seed).take(0, 0, 1)[0]) for seed in range(2000)]
    assert min(np.bincount(firsts, minlength=10)) > 140  # 200 each are expected, with a deviation of 13


# The order is part of what a run is: a run resumed with another version of this package or of NumPy must continue it.
PINNED = {
    Order(10): [5, 4, 6, 7, 9, 0, 1, 2, 3, 8],
    Order(10, seed=2**64 - 1): [3, 2, 8, 0, 1, 6, 9, 5, 4, 7],
    Order(10, chunk=3, window=2): [4, 3, 0, 5, 2, 1, 6, 8, 7, 9],
    Order(10, shuffle=False): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
}


@pytest.mark.parametrize("order", PINNED, ids=repr)
def test_order_stays_as_it_is(order):
    assert whole(order, epoch=3).tolist() == PINNED[order]


def test_numpy_has_the_generator_of_the_paper():
    # Known answer of Random123's philox4x64-10 for the key 0 and the counter 0, to which NumPy counts up from its end.
    raw = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [f"{word:016x}" for word in raw] == [
        *("16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"),
    ]


def test_other_process_agrees():
    order = Order(1000, seed=5, chunk=32)
    ask = f"from hpc_elastic.sampler import Order; print({order!r}.take(7, 700, 900).tolist())"
    run = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == str(order.take(7, 700, 900).tolist())


def test_what_is_taken_can_be_changed_without_harm():
    for order in (Order(50), Order(50, chunk=4)):
        before = whole(order).tolist()
        whole(order)[:] = 0
        order.take(0, 3, 9)[:] = 0
        assert whole(order).tolist() == before


@pytest.mark.parametrize(("epoch", "start", "stop"), [(0, -1, 3), (0, 3, 2), (0, 0, 11), (-1, 0, 1)])
def test_positions_out_of_range(epoch, start, stop):
    with pytest.raises(ValueError, match="no positions"):
        Order(10).take(epoch, start, stop)


@pytest.mark.parametrize("wrong", [{"samples": -1}, {"seed": -1}, {"seed": 2**64}, {"chunk": 0}, {"window": 0}])
def test_impossible_orders(wrong):
    with pytest.raises(ValueError, match=r"an order needs|must be at least 1"):
        Order(**{"samples": 1, **wrong})


@given(st.integers(0, 1000), st.integers(1, 300))
def test_steps_cover_the_epoch(samples, batch):
    steps = steps_per_epoch(samples, batch)
    assert [min(batch, samples - step * batch) for step in range(steps)] == [
        len(range(samples)[step * batch : (step + 1) * batch]) for step in range(steps)
    ]
    assert (steps - 1) * batch < samples <= steps * batch


@given(st.integers(0, 300), st.integers(1, 64))
def test_microbatches_cover_the_batch(size, n):
    parts = microbatches(size, n)
    assert len(parts) == n
    assert [sample for part in parts for sample in range(*part)] == list(range(size))
    sizes = [stop - begin for begin, stop in parts]
    assert max(sizes) - min(sizes) <= 1
    assert without_samples(size, n) == {number for number, length in enumerate(sizes) if length == 0}


@given(st.lists(st.integers(0, 2**64 - 1)) | st.lists(st.integers(0, 5), max_size=100))
def test_equal_keys_stay_in_their_order(keys):
    order = stable_order(np.array(keys, np.uint64))
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(len(keys)), key=lambda i: (keys[i], i))
