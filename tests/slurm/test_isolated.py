"""Companions on nodes with a hostname, network and processes of their own; a node can be lost with all of it."""

from __future__ import annotations

import json

import pytest

from hpc_elastic import events

from ..afterwards import happened, resizes
from .conftest import made
from .test_broker import Elastic, computed, until

EPOCHS = 30


@pytest.fixture(scope="module")
def isolated(tmp_path_factory):
    with made(tmp_path_factory.mktemp("isolated"), isolate=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def static(isolated, tmp_path_factory):
    return computed(isolated, tmp_path_factory.mktemp("static"), EPOCHS)


def companions(job):
    return [json.loads(path.read_text()) for path in job.path.glob("companions/*.held.json")]


def test_come_and_go(isolated, static, tmp_path):
    job = Elastic(isolated, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.05)
    job.ranks(4)
    assert len({member.host for member in job.run.status().members}) == 4
    isolated.run(["srun", "--nodes=2", "--exclusive", "true"])
    job.ranks(4)
    job.ended_well(static)
    assert 2 in [event.after for event in resizes(job.path)]
    assert not happened(job.path, events.Lost)


def test_a_node_crashes(isolated, static, tmp_path, request):
    """Its ranks are lost with their guards and the agent; the others go on. UCX can take a second rank along by a crash."""
    if not request.config.getoption("all_faults"):
        pytest.skip("one of --all-faults")
    job = Elastic(isolated, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.08, stall_s=60)
    job.ranks(4)
    isolated.crash(companions(job)[0]["node"])
    until(lambda: happened(job.path, events.Lost), 20)
    job.ended_well(static)
    assert sum(len(event.members) for event in happened(job.path, events.Lost)) <= 2
    assert not happened(job.path, events.Restarted)


def test_a_node_is_cut_off(isolated, static, tmp_path):
    """Its rank lives, and its files are there, but all wait for each other: the others go on without it."""
    job = Elastic(isolated, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.08, stall_s=3)
    job.ranks(4)
    node = companions(job)[0]["node"]
    isolated.cut(node)
    try:
        until(lambda: happened(job.path, events.Lost), 30)
    finally:
        isolated.mend(node)
    job.ended_well(static)
    assert not happened(job.path, events.Restarted)
