"""Ranks that all wait for each other: who goes on if the network has fallen apart, and who is not stuck."""

from __future__ import annotations

import itertools
import socket
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.comm.reach import LIMIT_S, Reach
from hpc_elastic.model import Member
from hpc_elastic.rundir import RunDirectory
from hpc_elastic.runtime.standstill import Standstill, severed

HOSTS = ["n1", "n2", "n3", "n4"]


@st.composite
def networks(draw):
    members = [Member(i, 1, host) for i, host in enumerate(draw(st.lists(st.sampled_from(HOSTS), min_size=1, max_size=8)))]
    some = st.frozensets(st.sampled_from(HOSTS))
    return members, {member.id: draw(some) - {member.host} for member in members}


@given(networks())
def test_who_goes_on_can_reach_each_other(network):
    members, cut_off = network
    lost = severed(members, cut_off)
    there = {member.host for member in members if member.id not in lost}
    assert there
    assert there.isdisjoint(member.host for member in members if member.id in lost), "a host goes on as a whole"
    apart = {frozenset((member.host, host)) for member in members for host in cut_off[member.id]}
    near = {host: {other for other in there if frozenset((host, other)) not in apart} for host in there}
    found = {min(there)}
    for _ in there:
        found |= set().union(*(near[host] for host in found))
    assert found == there
    outside = {member.host for member in members} - there
    assert all(frozenset((host, other)) in apart for host in there for other in outside)


@given(networks())
def test_no_smaller_part_goes_on(network):
    members, cut_off = network
    lost = severed(members, cut_off)
    rest = [member for member in members if member.id in lost]
    if rest:
        again = severed(rest, cut_off)
        assert len(rest) - len(again) <= len(members) - len(lost)
    if not any(cut_off.values()):
        assert not lost


def test_of_two_equal_parts_the_first_ranks_goes_on():
    members = [Member(5, 1, "n2"), Member(3, 1, "n1")]
    assert severed(members, {3: ["n2"]}) == {3}
    assert severed(members[::-1], {5: ["n1"]}) == {5}


class Network:
    """Stands in for the network, as one host sees it."""

    def __init__(self, *cut_off):
        self.gone = set(cut_off)

    def cut_off(self, hosts):
        return self.gone & set(hosts)


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


@pytest.fixture
def members():
    return [Member(i, 1, f"n{i}") for i in range(3)]


def ranks(run, members, *networks):
    return [Standstill(run, member, 2.0, 60.0, network) for member, network in zip(members, networks, strict=True)]


def condemned(run):
    return {int(path.name) for path in (run.path / "condemned").iterdir()}


def test_a_host_without_network(run, members):
    all_ranks = ranks(run, members, Network("n1"), Network("n0", "n2"), Network("n1"))
    for waited_s in (1.0, 3.0):
        assert [rank.look(members, waited_s) for rank in all_ranks] == ["", "", ""]
    assert condemned(run) == {1}


def test_one_who_computes_is_waited_for(run, members):
    first, second, third = ranks(run, members, Network("n1"), Network("n0", "n2"), Network("n1"))
    for _ in range(3):
        assert first.look(members, 100.0) == second.look(members, 100.0) == third.look(members, 0.0) == ""
    assert not condemned(run)


def test_words_of_those_who_go_on_are_taken_back(run, members):
    all_ranks = ranks(run, members, Network(), Network(), Network())
    for rank in all_ranks:
        rank.look(members, 3.0)
    assert len(list(run.path.rglob("*.waits"))) == 3
    for rank in all_ranks:
        rank.look(members, 0.0)
    assert not list(run.path.rglob("*.waits"))


def test_a_standstill_without_a_cause_ends(run, members):
    all_ranks = ranks(run, members, Network(), Network(), Network())
    assert [rank.look(members, 59.0) for rank in all_ranks] == ["", "", ""]
    assert "waited for each other for 61 s" in all_ranks[0].look(members, 61.0)
    assert not condemned(run)


def test_this_host_answers():
    """A closed port refuses, an open one takes: both are answers. What never answered is not held against a host."""
    reach = Reach()
    reach.learn({socket.gethostname(), "localhost", "no-such-host.invalid"})
    assert not reach.cut_off({socket.gethostname(), "localhost", "no-such-host.invalid"})


def test_who_was_stopped_itself_blames_no_host(monkeypatch):
    reach, times = Reach(), itertools.count(step=2 * LIMIT_S)
    reach.learn({"localhost"})
    monkeypatch.setattr("hpc_elastic.comm.reach.time", SimpleNamespace(monotonic=lambda: next(times)))
    assert not reach.cut_off({"localhost"})


def test_a_host_that_answers_no_more(monkeypatch):
    reach = Reach()
    reach.learn({"localhost"})
    monkeypatch.setattr("hpc_elastic.comm.reach._answering", lambda _: set())
    assert reach.cut_off({"localhost"}) == {"localhost"}
