"""What benchmarks.growth fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth import line, power, records

SIZES = st.sets(st.integers(2, 64), min_size=2)


@given(SIZES, st.floats(1e-6, 10), st.floats(-1, 3))
def test_a_power_is_found(sizes, c, k):
    assert power({n: c * n**k for n in sizes}) == pytest.approx((c, k), rel=1e-6, abs=1e-6)


@given(SIZES, st.floats(-1, 1), st.floats(-1, 1))
def test_a_line_is_found(sizes, a, b):
    assert line({n: a + b * n for n in sizes}) == pytest.approx((a, b), rel=1e-6, abs=1e-6)


def test_each_kind_has_its_sizes_and_the_exponents_of_its_cycles():
    found = {("sum", ""): {2: [[2.0, 2.0], [4.0]], 4: [[4.0, 4.0], [8.0]], 8: [[8.0], [64.0]]}}
    *sizes, fit = records(found, "mpich")
    assert [(one.metric, one.value, one.n, one.context["ranks"]) for one in sizes] == [
        ("sum_s", 2.0, 3, 2),
        ("sum_s", 4.0, 3, 4),
        ("sum_s", 36.0, 2, 8),
    ]
    assert (fit.metric, fit.n, fit.min, fit.max) == ("sum_exponent", 2, 1.0, 2.0)
