"""Real Slurm clusters for tests."""

from __future__ import annotations

import pytest

from slurm.cluster import Cluster
from slurm.cluster.configuration import Shape


def made(folder, **shape):
    return Cluster(folder / "cluster", Shape(**shape))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Four nodes on this host."""
    with made(tmp_path_factory.mktemp("slurm")) as up:
        yield up


@pytest.fixture
def fresh(tmp_path):
    """The same, for tests that disturb it."""
    with made(tmp_path) as up:
        yield up


@pytest.fixture
def nodes(tmp_path):
    """Four isolated nodes."""
    with made(tmp_path, isolate=True) as up:
        yield up
