"""What the elastic tests share."""

from __future__ import annotations

import subprocess

import pytest

from ..shards import write


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Two shard files of 8x8 images in ten classes that can be told apart."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system that soon is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"only root can mount the small disk: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
