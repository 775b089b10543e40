"""Tests on a GPU: skipped where CuPy sees none."""

from __future__ import annotations

import pytest

from hpc_elastic.arrays import gpu


def pytest_collection_modifyitems(items):
    """Skip those that need a GPU where there is none."""
    if gpu.library() is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and CuPy (the extra gpu)"))


@pytest.fixture
def cupy():
    return gpu.library()
