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
