"""What the elastic tests share."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_elastic.shards import write_shard

SAMPLES = 1000


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two shard files of 8x8 images in ten classes that can be told apart."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(5)
    label = random.integers(0, 10, SAMPLES)
    centres = random.integers(0, 256, (10, 8, 8))
    image = np.clip(centres[label] + random.normal(0, 60, (SAMPLES, 8, 8)), 0, 255).astype(np.uint8)
    for number, part in enumerate((slice(0, 380), slice(380, SAMPLES))):
        write_shard(folder / f"part-{number}.h5", {"image": image[part], "label": label[part]})
    return folder
