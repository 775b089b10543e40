"""What the elastic tests share."""

from __future__ import annotations

import pytest

from ..shards import write


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two shard files of 8x8 images in ten classes that can be told apart."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    return folder


@pytest.fixture
def all_faults(pytestconfig):
    """Leave the test out unless all are asked for: it takes long, and the default run has to be short."""
    if not pytestconfig.getoption("all_faults"):
        pytest.skip("takes long, one of --all-faults: `pytest --all-faults` runs it")
