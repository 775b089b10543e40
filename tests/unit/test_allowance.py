"""What `doctor` tells of a cluster."""

from __future__ import annotations

import pytest

from hpc_elastic.broker.slurm.allowance import Cluster, facts, summary
from hpc_elastic.broker.slurm.seen import Node, Partition, QueuedJob, Snapshot

IDLE, PENDING = frozenset({"idle"}), frozenset({"pending"})


def cluster(partitions=(), config=None, ways=("pmix",)):
    snapshot = Snapshot((Node("n1", IDLE), Node("n2", frozenset({"allocated"}))), (QueuedJob(7, states=PENDING),))
    return Cluster("24.11.5", tuple(partitions), config or {}, snapshot, ways, 0.0312)


def test_summary():
    assert summary(cluster()) == "24.11.5, 2 nodes, 1 idle, 1 job waiting; a look at the queue takes 31 ms"


def test_partitions():
    main = Partition("main", default=True, node_count=4, max_time_s=86400.0, max_nodes=2, priority_tier=2)
    low = Partition("low", node_count=4, preempt_mode="requeue", grace_s=30.0, max_time_s=600.0, allowed_accounts="a,b")
    off = Partition("off", up=False)
    found = facts(cluster([main, low, off]))
    assert found["partition main*"] == "4 nodes, up to 24 hours, at most 2 nodes a job"
    assert found["partition low"] == (
        "4 nodes, up to 10 minutes, its jobs are requeued for those of main, after 30 s of grace, only for accounts a,b"
    )
    assert found["partition off"] == "down"
    assert "--partition=low" in found["in the script"]
    assert "slurm_options" not in facts(cluster([main]))["in the script"]


@pytest.mark.parametrize(
    ("config", "what", "said"),
    [
        ({"AccountingStorageType": "accounting_storage/none"}, "accounting", "none: any account and QOS is taken"),
        ({"AccountingStorageType": "accounting_storage/slurmdbd"}, "accounting", "slurmdbd, for the record"),
        (
            {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": "associations,qos"},
            "accounting",
            "slurmdbd, enforces associations,qos: companions have the job's own account and QOS",
        ),
        ({"JobRequeue": "0"}, "requeue", "off by default: `hpc-elastic submit` asks for it, with --requeue"),
        (
            {"SchedulerParameters": "permit_job_expansion,defer"},
            "expand in place",
            "allowed, and not used: nodes come as companions",
        ),
        (
            {"PrivateData": "jobs,usage"},
            "nodes for others",
            "PrivateData hides the jobs of others: --policy considerate sees only your own",
        ),
    ],
)
def test_configuration(config, what, said):
    assert facts(cluster(config=config))[what] == said
