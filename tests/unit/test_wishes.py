"""What a queue means for a job: who waits for nodes, which nodes suit, what companions are to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.broker.slurm.companions import MARK, Asked, Companion
from hpc_elastic.broker.slurm.seen import Node, QueuedJob, Snapshot
from hpc_elastic.broker.slurm.wishes import Needs, seen_from

PENDING, RUNNING = frozenset({"pending"}), frozenset({"running"})
NEEDS = Needs(job=1, host="n1", name="train", partition="main", end_s=10_000.0)


def node(name, *states, **more):
    given = {"cpus": 4, "partitions": ("main", "low"), "features": ("fast",), **more}
    return Node(name, frozenset(states or ("idle",)), **given)


def waits(number=7, **more):
    given = {"partitions": ("main",), "reason": "Resources", "node_count": 2, "states": PENDING, **more}
    return QueuedJob(number, **given)


def seen(nodes, *jobs, needs=NEEDS, companions=None):
    return seen_from(Snapshot(tuple(nodes), jobs), needs, companions or {})


def test_nodes_that_suit():
    nodes = [
        node("n1", "allocated"),
        node("n2"),
        node("n3", "idle", "drain"),
        node("n4", cpus=1),
        node("n5", partitions=("other",)),
        node("n6", features=()),
    ]
    needs = Needs(job=1, host="n1", partition="main", cpus=2, features="fast")
    queue = seen(nodes, needs=needs)
    assert queue.idle == {"n2", "n4", "n5", "n6"}
    assert queue.usable == {"n2"}
    assert "drain" in queue.failing["n3"]


@pytest.mark.parametrize("reason", ["Dependency", "BeginTime", "JobHeldUser", "QOSMaxJobsPerUserLimit", "PartitionDown"])
def test_who_waits_for_something_else(reason):
    assert not seen([node("n1")], waits(reason=reason)).waiting


def test_a_node_that_slurm_has_planned_for_somebody():
    """It is there for who waits, and not for the job."""
    queue = seen([node("n1", "idle", "planned"), node("n2")], waits(node_count=2))
    assert (queue.idle, queue.usable) == ({"n1", "n2"}, {"n2"})
    assert queue.room({0: "n3"}, is_considerate=True).back == ()


def test_who_waits_for_nodes():
    nodes = [node("n1"), node("n2", "allocated"), node("n3", features=()), node("n4", "down"), node("n5")]
    (job,) = seen(nodes, waits(features="fast", excluded_nodes="n5")).waiting
    assert (job.name, job.nodes, job.could_use) == ("job 7", 2, {"n1", "n2"})
    (job,) = seen(nodes, waits(required_nodes="n[1,5]")).waiting
    assert job.could_use == {"n1", "n5"}
    (job,) = seen(nodes, waits(features="[a*2&b*3]")).waiting
    assert job.could_use == {"n1", "n2", "n3", "n5"}, "what can't be told apart is not held against who waits"


def test_the_order_of_the_line():
    jobs = [waits(1, priority=5), waits(2, priority=9), waits(3, priority=5)]
    assert [job.name for job in seen([node("n1")], *jobs).waiting] == ["job 2", "job 1", "job 3"]


def test_companions_wait_for_nobody():
    """Neither this job's nor those of another one: two elastic jobs don't push each other out."""
    assert not seen([node("n1")], waits(comment=MARK + "0123 4")).waiting


def test_what_becomes_of_companions():
    companions = {
        0: Companion(0, Asked(ranks=1, time=0.0, allocation=20)),
        1: Companion(1, Asked(ranks=1, time=0.0, allocation=21)),
        2: Companion(2, Asked(ranks=1, time=0.0, allocation=22), end="over"),
    }
    jobs = [
        QueuedJob(20, states=RUNNING, end_s=500.0, preempt_s=480.0),
        QueuedJob(21, states=PENDING, reason="Priority"),
        QueuedJob(22, states=RUNNING, end_s=1.0),
        QueuedJob(1, states=RUNNING, end_s=900.0),
    ]
    queue = seen([], *jobs, companions=companions)
    assert (queue.preempted, queue.end_of) == ({0}, {0: 500.0})
    assert queue.own_end_s == 900.0
    assert seen([]).own_end_s == 10_000.0


@given(st.floats(0, 20_000))
def test_no_companion_is_asked_for_longer_than_the_job_has(now):
    """In whole minutes, and never 0, which would be no limit at all."""
    (limit,) = [option for option in NEEDS.asked(now) if option.startswith("--time=")]
    minutes = int(limit.removeprefix("--time="))
    assert minutes >= 1
    assert minutes == 1 or now + 60 * minutes <= NEEDS.end_s


def test_a_companion_is_like_the_jobs_own_allocation():
    own = QueuedJob(
        5, name="x", partitions=("main",), account="a", qos="q", features="fast", gres="gpu:2", reservation="r", end_s=None
    )
    asked = Needs.of(own, "n1", 1, ["--mem=1G"]).asked(0.0, ["n2", "n3"])
    assert set(asked) >= {
        "--partition=main",
        "--account=a",
        "--qos=q",
        "--constraint=fast",
        "--gres=gpu:2",
        "--reservation=r",
    }
    assert "--exclude=n[2-3]" in asked
    assert not [option for option in asked if option.startswith("--time")]
    assert asked[-1] == "--mem=1G"
