"""What a cluster allows elastic jobs, for people on its login node. Pure, but for `ask`."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .commands import Commands
from .seen import Partition, Snapshot

TAKES = {"cancel": "ended", "requeue": "requeued", "suspend": "suspended", "gang": "suspended"}


@dataclass(frozen=True)
class Cluster:
    """What was asked of a cluster.

    Attributes
    ----------
    release : str
        Version of Slurm.
    config : mapping of str to str
        What ``scontrol show config`` prints.
    ways : tuple of str
        How ``srun`` can start MPI.
    asked_s : float
        How long one look at the queue takes.
    """

    release: str
    partitions: tuple[Partition, ...]
    config: Mapping[str, str]
    snapshot: Snapshot
    ways: tuple[str, ...]
    asked_s: float


def ask(commands: Commands) -> Cluster:
    """Ask the cluster; five commands.

    Raises
    ------
    SlurmError
        If it does not answer.
    """
    begun = time.monotonic()
    snapshot = commands.snapshot()
    asked_s = time.monotonic() - begun
    return Cluster(commands.release(), commands.partitions(), commands.config(), snapshot, commands.launch_ways(), asked_s)


def summary(cluster: Cluster) -> str:
    """Return the cluster in one line."""
    nodes = cluster.snapshot.nodes
    idle = sum(node.idle and not node.planned for node in nodes)
    waiting = len(cluster.snapshot.pending)
    return (
        f"{cluster.release}, {len(nodes)} nodes, {idle} idle, {waiting} job{'s' if waiting != 1 else ''} waiting; "
        f"a look at the queue takes {cluster.asked_s * 1000:.0f} ms"
    )


def facts(cluster: Cluster) -> dict[str, str]:
    """Return what the cluster allows, and what to put into the script for it."""
    config, partitions = cluster.config, cluster.partitions
    return {
        **{f"partition {p.name}{'*' if p.default else ''}": _partition(p, partitions) for p in partitions},
        "accounting": _accounting(config),
        "requeue": "allowed: a job goes on in another one after its time limit"
        if config.get("JobRequeue", "1") == "1"
        else "off by default: `hpc-elastic submit` asks for it, with --requeue",
        "expand in place": _expansion(config),
        "MPI by srun": f"{', '.join(cluster.ways) or 'none'} (not needed: ranks have MPICH's own launchers)",
        "nodes for others": "jobs in the queue can be seen: considerate works"
        if "jobs" not in config.get("PrivateData", "none")
        else "PrivateData hides the jobs of others: --policy considerate sees only your own",
        "in the script": _script(partitions),
    }


def _partition(partition: Partition, others: Sequence[Partition]) -> str:
    if not partition.up:
        return "down"
    limit = f"up to {_hours(partition.max_time_s)}" if partition.max_time_s else "no time limit"
    said = [f"{partition.node_count} nodes", limit]
    if partition.max_nodes:
        said.append(f"at most {partition.max_nodes} nodes a job")
    if above := _above(partition, others):
        grace = f"after {partition.grace_s:g} s of grace" if partition.grace_s else "at once"
        said.append(f"its jobs are {TAKES[partition.preempt_mode]} for those of {', '.join(above)}, {grace}")
    if partition.oversubscribe == "exclusive":
        said.append("whole nodes only")
    if partition.allowed_accounts != "all":
        said.append(f"only for accounts {partition.allowed_accounts}")
    return ", ".join(said)


def _above(partition: Partition, others: Sequence[Partition]) -> list[str]:
    """Return the partitions whose jobs preempt those of `partition`."""
    if partition.preempt_mode not in TAKES:
        return []
    return [other.name for other in others if other.priority_tier > partition.priority_tier]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:g} hours" if seconds >= 3600 else f"{seconds / 60:g} minutes"  # noqa: PLR2004


def _accounting(config: Mapping[str, str]) -> str:
    kind = config.get("AccountingStorageType", "").rpartition("/")[2]
    if kind in {"", "none", "(null)"}:
        return "none: any account and QOS is taken"
    enforced = config.get("AccountingStorageEnforce", "none")
    asks = re.search(r"associations|limits|qos|safe|wckeys", enforced)
    return (
        f"{kind}, enforces {enforced}: companions have the job's own account and QOS" if asks else f"{kind}, for the record"
    )


def _expansion(config: Mapping[str, str]) -> str:
    may = "permit_job_expansion" in config.get("SchedulerParameters", "")
    return f"{'allowed' if may else 'not allowed'}, and not used: nodes come as companions"


def _script(partitions: Sequence[Partition]) -> str:
    low = [p for p in partitions if p.up and p.grace_s and _above(p, partitions)]
    said = "`hpc-elastic submit --dry-run SCRIPT` prints one"
    if low:
        best = max(low, key=lambda p: p.grace_s)
        said += f"; --set slurm_options=--partition={best.name} has companions give way to others at once"
    return said
