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
    job.submit(epochs=EPOCHS, pause_s=0.2)
    job.ranks(4)
    assert len({member.host for member in job.run.status().members}) == 4
    isolated.run(["srun", "--nodes=2", "--exclusive", "true"])
    job.ranks(4)
    job.ended_well(static)
    assert 2 in [event.after for event in resizes(job.path)]
    assert not happened(job.path, events.Lost)


def test_a_node_is_cut_off(isolated, static, tmp_path):
    """Its rank lives, and its files are there, but all wait for each other: the others go on without it."""
    job = Elastic(isolated, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.1, stall_s=3)
    job.ranks(4)
    node = companions(job)[0]["node"]
    isolated.cut(node)
    try:
        until(lambda: happened(job.path, events.Lost), 30)
    finally:
        isolated.mend(node)
    job.ended_well(static)
    assert not happened(job.path, events.Restarted)


def test_a_rank_is_killed(isolated, static, tmp_path):
    """The others know before they send it something, over a connection that has broken, which would crash them.

    The first rank is replaced on its host, though the leader is elsewhere then.
    """
    job = Elastic(isolated, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.2)
    job.ranks(4)
    first = job.run.status().members[0].host
    for rank in (3, 0, 3):
        lost = len(happened(job.path, events.Lost))
        until(lambda: job.run.status().ranks == 4)
        hosts = [member.host for member in job.run.status().members]
        assert first in hosts
        member = job.run.status().members[rank]
        isolated.run(["kill", "-KILL", member.pid], member.host)
        until(lambda before=lost: len(happened(job.path, events.Lost)) > before, 20)
    job.ended_well(static)
    assert [len(event.members) for event in happened(job.path, events.Lost)] == [1, 1, 1]


def test_a_node_crashes(nodes, static, tmp_path):
    """Its rank is lost with its guard and the agent, long before it would count as stalled; the others go on."""
    job = Elastic(nodes, tmp_path)
    job.submit(epochs=EPOCHS, pause_s=0.1, stall_s=60)
    job.ranks(4)
    nodes.crash(companions(job)[0]["node"])
    until(lambda: happened(job.path, events.Lost), 20)
    job.ended_well(static)
    assert [len(event.members) for event in happened(job.path, events.Lost)] == [1]
    assert not happened(job.path, events.Restarted)
