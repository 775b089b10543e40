"""What stands in the configuration files of the cluster. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PORTS = 3  # besides one for each node: slurmctld, slurmdbd, MariaDB
NET = "10.77.0"
# A job that is pending starts within half a second of nodes being free: the scheduler looks at every chance.
SCHEDULER = "batch_sched_delay=0,sched_interval=1,sched_min_interval=1000,bf_interval=1,bf_continue,permit_job_expansion"


@dataclass(frozen=True)
class Shape:
    """What the cluster is like.

    Attributes
    ----------
    nodes : int
        Number of nodes, n1, n2 and so on.
    cpus, memory_mb : int
        What each node pretends to have.
    isolate : bool
        Each node has namespaces of its own, with a network and a hostname.
    accounting : bool
        With MariaDB and slurmdbd.
    grace_s : int
        Grace time of jobs that are preempted, in the partition ``low``.
    slurmd_timeout_s : int
        How long a node may be silent.
    extra : tuple of str
        More lines of slurm.conf.
    """

    nodes: int = 4
    cpus: int = 4
    memory_mb: int = 4000
    isolate: bool = False
    accounting: bool = False
    grace_s: int = 10
    slurmd_timeout_s: int = 10
    extra: tuple[str, ...] = field(default=())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(f"n{i}" for i in range(1, self.nodes + 1))


def slurm_conf(shape: Shape, folder: Path, host: str, ports: Sequence[int]) -> str:
    """Return slurm.conf; `ports` has those of `PORTS` and then one for each node, for nodes that share this host."""
    controller = "ctl" if shape.isolate else f"{host}(127.0.0.1)"
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={controller}",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/state/slurmctld.pid",
        f"SlurmdPidFile={folder}/spool/%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "ReturnToService=2",
        f"SlurmdTimeout={shape.slurmd_timeout_s}",
        "SlurmdParameters=config_overrides",
        "InactiveLimit=0",
        "KillWait=2",
        "MinJobAge=300",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SchedulerType=sched/backfill",
        f"SchedulerParameters={SCHEDULER}",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *shape.extra,
    ]
    if shape.accounting:
        where = "ctl" if shape.isolate else "127.0.0.1"
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageEnforce=associations,limits,qos",
            f"AccountingStorageHost={where}",
            f"AccountingStoragePort={ports[1]}",
            f"AccountingStoragePass={folder}/munge.socket",
        ]
    else:
        lines.append("AccountingStorageType=accounting_storage/none")
    node = f"CPUs={shape.cpus} RealMemory={shape.memory_mb} State=UNKNOWN"
    if shape.isolate:
        lines += [f"SlurmdPort={ports[2]}", *(f"NodeName={name} {node}" for name in shape.names)]
    else:
        own = ports[PORTS:]
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {node}"
            for name, port in zip(shape.names, own, strict=True)
        ]
    lines += [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime={shape.grace_s}",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def slurmdbd_conf(shape: Shape, folder: Path, host: str, ports: Sequence[int]) -> str:
    """Return slurmdbd.conf."""
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        f"DbdHost={'ctl' if shape.isolate else host}",
        *([] if shape.isolate else ["DbdAddr=127.0.0.1"]),
        f"DbdPort={ports[1]}",
        "SlurmUser=root",
        f"LogFile={folder}/log/slurmdbd.log",
        f"PidFile={folder}/state/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={ports[2]}",
        "StorageUser=slurm",
        "StoragePass=slurm",
        "StorageLoc=slurm_acct",
    ]
    return "\n".join(lines) + "\n"


def hosts(shape: Shape) -> str:
    """Return /etc/hosts of isolated nodes."""
    lines = ["127.0.0.1 localhost", f"{NET}.1 ctl"]
    return "\n".join([*lines, *(f"{address(i)} {name}" for i, name in enumerate(shape.names))]) + "\n"


def address(index: int) -> str:
    """Return the address of the isolated node number `index`, from 0."""
    return f"{NET}.{11 + index}"
