"""The Slurm broker's decisions, with a stand-in for the desk: nothing here speaks to Slurm, `tests/slurm` does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpc_elastic.broker.slurm.broker import FIRST_REST_S, Limits, SlurmBroker
from hpc_elastic.broker.slurm.companions import Asked, Companion, Held
from hpc_elastic.broker.slurm.desk import State
from hpc_elastic.broker.slurm.seen import Node, QueuedJob, Snapshot
from hpc_elastic.broker.slurm.wishes import Needs
from hpc_elastic.model import Lease

NEEDS = Needs(job=1, host="n1", partition="main")
SEED = (Lease(0, "n1"),)


class StandIn:
    """A desk that does nothing but write down what it is told."""

    def __init__(self, idle=("n2", "n3", "n4"), jobs=()):
        self.told = []
        nodes = tuple(Node(n, frozenset({"idle"}), cpus=4, partitions=("main",)) for n in idle)
        self.state = State({}, NEEDS, Snapshot(nodes, jobs))

    def ask(self, number, ranks, options):
        self.told.append(("ask", number, ranks))
        self.companion(number, Companion(number, Asked(ranks=ranks, time=0.0, allocation=100 + number)))
        self.options = options

    def cancel(self, number, why):
        self.told.append(("cancel", number, why))

    def give_up(self, number, why):
        self.told.append(("give up", number, why))

    def release(self, number):
        self.told.append(("release", number))
        self.companion(number, replace(self.state.companions[number], released=True))

    def companion(self, number, companion):
        self.state = replace(self.state, companions={**self.state.companions, number: companion})

    def change(self, number, **values):
        self.companion(number, replace(self.state.companions[number], **values))

    def held(self, number, node, gpus=""):
        held = Held(host=node, node=node, allocation=str(100 + number), gpus=gpus, pid=1, time=0.0)
        self.change(number, held=held)


@pytest.fixture
def now():
    return [1000.0]


@pytest.fixture
def desk():
    return StandIn()


@pytest.fixture
def broker(desk, now):
    return SlurmBroker(desk, Limits(), SEED, clock=lambda: now[0])


def poll(broker):
    return broker.poll(0, 0.0, 1)


def grown(broker, desk, n):
    broker.request(n, 60.0)
    for i, (_, number, _) in enumerate([told for told in desk.told if told[0] == "ask"]):
        desk.held(number, f"n{2 + i}")
    return poll(broker)


def test_idle_nodes_are_offered(broker):
    supply = poll(broker)
    assert (supply.offered, supply.leases, supply.revoked) == (3, SEED, ())
    assert "3 idle nodes" in supply.why


def test_nothing_is_known_yet(desk, now):
    desk.state = State({})
    broker = SlurmBroker(desk, Limits(ranks_per_node=2), SEED, clock=lambda: now[0])
    supply = poll(broker)
    assert supply.offered == 1, "the other slot of this host"
    assert "not been read" in supply.why


def test_a_request_is_pending_until_its_companions_run(broker, desk):
    broker.request(2, 60.0)
    assert [told[:2] for told in desk.told] == [("ask", 0), ("ask", 1)]
    assert (poll(broker).pending, poll(broker).offered) == (2, 1)
    desk.held(0, "n2")
    supply = poll(broker)
    assert (supply.pending, supply.refused) == (1, "")
    assert [(lease.host, lease.companion) for lease in supply.leases] == [("n1", -1), ("n2", 0)]
    desk.change(1, end="Slurm said no")
    supply = poll(broker)
    assert (supply.pending, supply.refused) == (0, "Slurm said no")


def test_several_ranks_on_a_node_share_its_gpus(desk, now):
    broker = SlurmBroker(desk, Limits(ranks_per_node=2), SEED, clock=lambda: now[0])
    broker.request(3, 60.0)
    assert desk.told == [("ask", 0, 2)], "one on this host, and two on a companion"
    desk.held(0, "n2", gpus="0,1,2,3")
    supply = poll(broker)
    assert [lease.gpus for lease in supply.leases if lease.companion == 0] == ["0,1", "2,3"]
    assert len({lease.slot for lease in supply.leases}) == 4


def test_after_a_refusal_nothing_is_asked_for_a_while(broker, desk, now):
    broker.request(1, 60.0)
    desk.change(0, end="no such account")
    poll(broker)
    supply = poll(broker)
    assert supply.offered == 0
    assert "no such account" in supply.why
    now[0] += FIRST_REST_S + 1
    assert poll(broker).offered == 3


def test_patience_ends(broker, desk, now):
    broker.request(1, 60.0)
    now[0] += 11
    poll(broker)
    poll(broker)
    assert [told[:2] for told in desk.told] == [("ask", 0), ("give up", 0)], "once"
    desk.held(0, "n2")
    assert poll(broker).leases == SEED, "what begins at the last moment is not used"


def test_withdrawn(broker, desk):
    broker.request(2, 60.0)
    broker.withdraw()
    assert {told[1] for told in desk.told if told[0] == "cancel"} == {0, 1}


def test_given_back_when_the_last_of_its_leases_is(desk, now):
    broker = SlurmBroker(desk, Limits(ranks_per_node=2), (Lease(0, "n1"), Lease(1, "n1")), clock=lambda: now[0])
    supply = grown(broker, desk, 2)
    one, two = [lease for lease in supply.leases if lease.companion == 0]
    broker.release((one,))
    assert ("release", 0) not in desk.told
    broker.release((two,))
    assert desk.told[-1] == ("release", 0)
    assert poll(broker).leases == (Lease(0, "n1"), Lease(1, "n1"))


def test_a_node_where_none_could_start_is_left_out(broker, desk):
    supply = grown(broker, desk, 1)
    broker.release(supply.leases[1:], 30.0)
    broker.request(1, 60.0)
    assert "--exclude=n2" in desk.options


@pytest.mark.parametrize(
    ("values", "why"),
    [({"told": True}, "preempted"), ({"end": "it was told to end"}, "it was told to end")],
)
def test_what_has_to_go(values, why, broker, desk):
    supply = grown(broker, desk, 2)
    desk.change(0, **values)
    supply = poll(broker)
    assert [lease.companion for lease in supply.revoked] == [0]
    assert why in supply.why


def look(desk, now, nodes, *jobs):
    now[0] += 1
    desk.state = replace(desk.state, snapshot=Snapshot(nodes, jobs), read_s=now[0])


def test_who_waits_gets_what_lacks(desk, broker, now):
    grown(broker, desk, 3)
    waiting = QueuedJob(9, partitions=("main",), reason="Resources", node_count=1, states=frozenset({"pending"}))
    nodes = tuple(Node(f"n{i}", frozenset({"allocated"}), cpus=4, partitions=("main",)) for i in range(1, 5))
    desk.state = replace(desk.state, snapshot=Snapshot(nodes, (waiting,)))
    supply = poll(broker)
    assert [lease.companion for lease in supply.revoked] == [2]
    broker.release(supply.revoked)
    assert not poll(broker).revoked, "what was given back counts, though it is not idle yet"
    desk.change(2, end="", ended_s=1000.0)
    now[0] += 20
    given_back = QueuedJob(102, nodes="n4", states=frozenset({"completing"}))
    look(desk, now, nodes, waiting, given_back)
    assert not poll(broker).revoked, "Slurm is slow"
    look(desk, now, nodes, waiting, QueuedJob(7, nodes="n4", states=frozenset({"running"})))
    assert poll(broker).revoked, "another one has taken it"


def test_a_job_that_has_begun_since_the_nodes_were_read(desk, broker, now):
    nodes = tuple(Node(f"n{i}", frozenset({"idle"}), cpus=4, partitions=("main",)) for i in range(2, 5))
    look(desk, now, nodes, QueuedJob(7, nodes="n[3-4]", node_count=2, states=frozenset({"running"})))
    assert poll(broker).offered == 1


def test_node_hours(desk, now):
    broker = SlurmBroker(desk, Limits(node_hours=1.0), SEED, clock=lambda: now[0])
    grown(broker, desk, 2)
    assert not poll(broker).revoked
    now[0] = 1801.0
    supply = poll(broker)
    assert len(supply.revoked) == 2
    assert "node_hours" in supply.why


def test_slurm_does_not_answer(broker, desk):
    grown(broker, desk, 1)
    desk.state = replace(desk.state, trouble="slurmctld is away")
    supply = poll(broker)
    assert (supply.offered, supply.revoked) == (0, ())
    assert "slurmctld is away" in supply.why
    broker.request(1, 60.0)
    assert "slurmctld is away" in poll(broker).refused


def test_companions_that_nobody_uses_are_ended(desk, now):
    """Of a leader, or an attempt, before."""
    desk.companion(4, Companion(4, Asked(ranks=1, time=0.0, allocation=104)))
    SlurmBroker(desk, Limits(), SEED, clock=lambda: now[0])
    assert desk.told[0][:2] == ("cancel", 4)


def test_a_new_leader_goes_on_with_those_that_are_used(desk, now):
    desk.companion(4, Companion(4, Asked(ranks=1, time=0.0, allocation=104)))
    desk.held(4, "n2")
    lease = Lease(5 * 1024, "n2", 4)
    broker = SlurmBroker(desk, Limits(own_host="n1"), (*SEED, lease), clock=lambda: now[0])
    assert not desk.told
    assert lease in poll(broker).leases
    broker.request(1, 60.0)
    assert desk.told[0][:2] == ("ask", 5)


def test_a_leader_elsewhere_uses_the_jobs_own_host(desk, now):
    """The agent there starts ranks, since the first one is lost."""
    desk.companion(4, Companion(4, Asked(ranks=1, time=0.0, allocation=104)))
    desk.held(4, "n2")
    lease = Lease(5 * 1024, "n2", 4)
    broker = SlurmBroker(desk, Limits(own_host="n1"), (lease,), clock=lambda: now[0])
    broker.request(1, 60.0)
    assert Lease(0, "n1") in poll(broker).leases
    assert not desk.told
