"""Shards for test jobs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hpc_elastic.shards import write_shard

SAMPLES = 1000


def write(folder: Path) -> None:
    """Write two shard files of 8x8 images in ten classes that can be told apart."""
    random = np.random.default_rng(5)
    label = random.integers(0, 10, SAMPLES)
    centres = random.integers(0, 256, (10, 8, 8))
    image = np.clip(centres[label] + random.normal(0, 60, (SAMPLES, 8, 8)), 0, 255).astype(np.uint8)
    for number, part in enumerate((slice(0, 380), slice(380, SAMPLES))):
        write_shard(folder / f"part-{number}.h5", {"image": image[part], "label": label[part]})
