"""Rules for the batch and the learning rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.keras import rules

positive = st.floats(1e-12, 1e12)
scales = st.floats(1, 1024)


@given(st.sampled_from(rules.RULES[:3]))
def test_one_rank_changes_nothing(rule):
    assert rules.factor(rule, 1.0) == 1.0


@given(scales)
def test_the_rules_are_ordered(scale):
    assert rules.factor("fixed", scale) <= rules.factor("sqrt", scale) <= rules.factor("linear", scale) == scale


@given(st.integers(1, 1000), st.integers(1, 64))
def test_batches(batch, ranks):
    assert rules.batch_of("fixed", batch) == batch
    of_ranks = rules.batch_of("linear", batch)
    assert callable(of_ranks)
    assert of_ranks(ranks) == batch * ranks


@given(positive, positive, scales)
def test_the_gain_is_between_one_and_the_scale(variance, square, scale):
    found = rules.gain(variance, square, scale)
    assert 1 - 1e-9 <= found <= scale * (1 + 1e-9)


@given(positive, scales)
def test_the_gain_at_its_ends(value, scale):
    assert rules.gain(value, 0.0, scale) == pytest.approx(scale)
    assert rules.gain(0.0, value, scale) == pytest.approx(1.0)
    assert rules.gain(0.0, 0.0, scale) == 1.0


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), scales)
def test_smoothing_keeps_the_bounds(found, scale):
    ada = rules.AdaScale()
    for variance, square in found:
        assert 1 - 1e-6 <= ada.factor(variance, square, scale) <= scale * (1 + 1e-6)


def test_moments_are_unbiased():
    rng = np.random.default_rng(0)
    true, spread, parts, part, base, size = 0.3, 2.0, 16, 8, 32, 50
    variances, squares = [], []
    for _ in range(2000):
        gradients = rng.normal(true, spread / np.sqrt(part), (parts, size))  # of a microbatch each
        norm = float((gradients.mean(0) ** 2).sum())
        variance = ((gradients**2).sum(1).mean() - norm) * parts / (parts - 1)
        found = rules.moments(float((gradients**2).sum(1).mean()), norm, parts, part, base)
        assert found == pytest.approx((variance * part / base, max(0, norm - variance / parts)))
        variances.append(found[0])
        squares.append(found[1])
    assert np.mean(variances) == pytest.approx(size * spread**2 / base, rel=0.02)
    assert np.mean(squares) == pytest.approx(size * true**2, rel=0.05)


def test_what_is_not_finite_is_left_out():
    ada = rules.AdaScale()
    first = ada.factor(1.0, 1.0, 4.0)
    for squares, square in ((np.nan, np.nan), (np.inf, np.inf), (np.inf, np.nan)):
        assert ada.factor(*rules.moments(squares, square, 4, 8, 32), 4.0) == first


def test_a_single_microbatch_leaves_the_memory():
    ada = rules.AdaScale()
    first = ada.factor(*rules.moments(2.0, 1.0, 4, 8, 32), 4.0)
    memory = dict(ada.memory)
    assert ada.factor(*rules.moments(2.0, 2.0, 1, 1, 32), 4.0) == first
    assert ada.memory == memory | {"steps": 2 * first}


def test_steps_that_are_left_out_are_not_counted():
    ada = rules.AdaScale()
    ada.factor(*rules.moments(np.inf, np.nan, 4, 8, 32), 4.0)
    assert ada.memory["steps"] == 0
    ada.factor(*rules.moments(2.0, 2.0, 1, 1, 32), 1.0)  # a single microbatch
    assert ada.memory["steps"] == 1
