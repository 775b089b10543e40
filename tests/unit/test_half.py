"""Sums of two bytes a value: against ml_dtypes and NumPy, and the same bits however ranks and hosts are grouped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ml_dtypes import bfloat16

from hpc_elastic import reduce
from hpc_elastic.errors import ConfigError
from hpc_elastic.reduce import half
from hpc_elastic.reduce.adding import add_up
from hpc_elastic.reduce.order import Node, pairs

from .test_reduce import FakeWorld, bits, noise, tree_sum, use, weight_of

WIRES = {"bfloat16": bfloat16, "float16": np.float16}
BITS = arrays(np.uint32, st.integers(0, 40), elements=st.integers(0, 2**32 - 1))
SOME = np.array([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-8, 65504, 65520, 1e-45, 3.4e38, np.inf, -np.inf, np.nan], np.float32)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def stored(values, wire):
    """Return `values` as they are kept."""
    out = np.empty(len(values), half.WIRES[wire])
    half.store(values, None, out)
    return out


def seen(kept):
    """Return kept values as float32, of which all that are no numbers are alike."""
    wide = np.empty(len(kept), np.float32)
    half.load(kept, wide)
    return same_nan(wide)


def same_nan(values):
    return np.where(np.isnan(values), np.float32(np.nan), values.astype(np.float32)).tobytes()


@pytest.mark.parametrize("wire", WIRES)
@given(BITS)
def test_rounding(wire, raw):
    values = np.concatenate([raw.view(np.float32), SOME])
    assert seen(stored(values, wire)) == same_nan(values.astype(WIRES[wire]))


@pytest.mark.parametrize("wire", WIRES)
@given(BITS, st.integers(0, 2**32 - 1))
def test_adding(wire, raw, seed):
    left = np.concatenate([raw.view(np.float32), SOME])
    right = np.random.default_rng(seed).permutation(left)
    out = np.empty(len(left), half.WIRES[wire])
    half.plus(stored(left, wire), stored(right, wire), out)
    assert seen(out) == same_nan(left.astype(WIRES[wire]) + right.astype(WIRES[wire]))


@pytest.mark.parametrize("wire", WIRES)
def test_long_arrays_go_in_stretches(wire):
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal(3 * half.STRETCH + 5).astype(np.float32) for _ in range(5)]
    out = np.empty(len(parts[0]), half.WIRES[wire])
    add_up(pairs(Node(0, i) for i in range(5)), [stored(part, wire) for part in parts], out)
    assert seen(out) == same_nan(tree_sum([part.astype(WIRES[wire]) for part in parts]))


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_stored_is_weighted_first(wire):
    for dtype in (np.float32, np.float64):
        values = np.random.default_rng(2).standard_normal((3, 5)).astype(dtype)[:, ::2]
        out = np.empty((3, 3), half.WIRES[wire])
        half.store(values, 0.3, out)
        assert seen(out.reshape(-1)) == same_nan((values * dtype(0.3)).astype(WIRES[wire]).reshape(-1))


def mixed(step, leaf):
    return {
        "w": noise(step, leaf, (300, 2), "f4"),
        "rest": [noise(step, leaf, (5,), "f8"), (noise(step, leaf, (), "i8"), noise(step, leaf, (4,), "u2"))],
        "half": noise(step, leaf, (7,), "f2"),
        "number": float(leaf),
        "none": np.empty((0, 3), "f4"),
    }


def run(size, hosts, leaves, empties, wire):
    def body(ranks):
        total = reduce.Sum(leaves, lambda: ranks, wire=wire)
        found = [use(total, step, leaves, empty, mixed) for step, empty in enumerate(empties)]
        return [(bits(tree), metrics) for tree, metrics in found[-1:]]

    return FakeWorld(size, hosts).run(body)


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 12), st.data(), st.sampled_from([0, 1 << 15]), st.sampled_from(list(WIRES)))
def test_same_bits_at_all_sizes_and_hosts(leaves, data, small, wire):
    empty = data.draw(st.sets(st.integers(0, leaves - 1), max_size=leaves - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "SMALL_BYTES", small)
        expected = run(1, 1, leaves, [set(), empty], wire)[0]
        for size in (2, 3, 4):
            for hosts in range(1, 4):
                assert run(size, hosts, leaves, [set(), empty], wire) == [expected] * size


@pytest.mark.parametrize("wire", WIRES)
def test_the_sum_is_that_of_the_tree(wire):
    leaves = 6
    ((got, metrics),) = run(3, 2, leaves, [set()], wire)[0]

    def expected(take, dtype, result):
        weights = [np.dtype(dtype).type(weight_of(i, leaves, set())) for i in range(leaves)]
        return bits(tree_sum([(take(mixed(0, i)) * weights[i]).astype(WIRES[wire]) for i in range(leaves)]).astype(result))

    assert got["w"] == expected(lambda v: v["w"], "f4", "f4")
    assert got["half"] == bits(
        tree_sum([mixed(0, i)["half"] * np.float16(weight_of(i, leaves, set())) for i in range(leaves)])
    )
    assert got["rest"][1][1] == bits(sum(mixed(0, i)["rest"][1][1] for i in range(leaves)).astype("u2"))
    assert got["number"][0] == "<f8"
    assert metrics["loss"] == tree_sum(
        [float(noise(0, i, (), "f8")) * weight_of(i, leaves, set()) for i in range(leaves)]
    ), "metrics keep their precision"


def test_half_of_the_bytes():
    kept = reduce.Sum(1, lambda: None, wire="bfloat16")
    plain = reduce.Sum(1, lambda: None)
    for total in (kept, plain):
        total._ranks = lambda: FakeWorld(1).run(lambda ranks: ranks)[0]
        total.add(0, np.zeros(3200, np.float32), {}, 1.0)
    assert 2 * kept._parts[0].form.nbytes == plain._parts[0].form.nbytes


def test_what_is_refused():
    with pytest.raises(ConfigError, match="take 'bfloat16' or 'float16'"):
        reduce.Sum(1, lambda: None, wire="float8")
    with pytest.raises(ConfigError, match="needs exact=True"):
        reduce.Sum(1, lambda: None, exact=False, wire="float16")
