"""What is seen of a cluster: frozen values, the same whatever they were read with.

Words are lower case (``"running"``, ``"not_responding"``). Times are seconds since 1970, None where there is none; memory is
in MiB, as Slurm counts it.
"""

from __future__ import annotations

from collections.abc import Container

import msgspec

BROKEN = frozenset(
    {"down", "error", "fail", "drain", "drained", "draining", "not_responding", "unknown", "future", "invalid"}
)
BUSY = frozenset({"allocated", "mixed", "completing"})
KEPT = frozenset({"maintenance", "reserved", "powered_down", "powering_down", "power_down", "reboot_requested"})


class Node(msgspec.Struct, frozen=True):
    """One node.

    Attributes
    ----------
    states : frozenset of str
        Its state and its flags, such as ``{"idle", "drain"}``.
    gres, gres_used : str
        Generic resources, such as ``"gpu:a100:4"``, as Slurm writes them.
    reason : str
        Why it is drained or down.
    """

    name: str
    states: frozenset[str]
    cpus: int = 0
    cpus_allocated: int = 0
    memory_mib: int = 0
    gres: str = ""
    gres_used: str = ""
    partitions: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    reason: str = ""

    @property
    def broken(self) -> bool:
        """Whether no new job may start here, and those that run here had better leave."""
        return bool(self.states & BROKEN)

    @property
    def idle(self) -> bool:
        """Whether all of it is free for a job now."""
        return "idle" in self.states and not self.states & (BROKEN | BUSY | KEPT)

    @property
    def planned(self) -> bool:
        """Whether it is kept for a pending job, which will start here when it has all it needs."""
        return "planned" in self.states


class QueuedJob(msgspec.Struct, frozen=True):
    """One job of the queue, waiting, running or just over.

    Attributes
    ----------
    array_id, array_task : int or None
        The array that it belongs to, and its number in it; the number is None for tasks that still wait together.
    array_tasks : str
        Those tasks, such as ``"2-9%4"``.
    partitions : tuple of str
        Where it may run; where it runs, once it does.
    reason : str
        Why it waits, as Slurm says it: ``"Priority"``, ``"Resources"``, …
    nodes : str
        The nodes that it has, as a host list (`hosts.names`).
    node_count, max_nodes : int
        Nodes that it has or wants at least, and wants at most.
    tres, gres : str
        What it asks for in all, and per node, job, task or socket, as Slurm writes it.
    memory_node_mib, memory_cpu_mib : int
        Memory that it wants per node or per CPU; 0 stands for Slurm's default.
    start_s : float or None
        When it began; for a job that waits, when Slurm expects it to.
    end_s : float or None
        When it will be ended at the latest.
    time_limit_s : float or None
        None: no limit.
    preempt_s : float or None
        When its preemption **began**: the end of its grace is `grace_end_s`.
    exclusive, shared : bool
        Whether it wants its nodes alone, or doesn't mind others on its CPUs.
    """

    id: int
    name: str = ""
    user: str = ""
    account: str = ""
    partitions: tuple[str, ...] = ()
    qos: str = ""
    states: frozenset[str] = frozenset()
    reason: str = ""
    nodes: str = ""
    node_count: int = 0
    max_nodes: int = 0
    cpus: int = 0
    tres: str = ""
    gres: str = ""
    memory_node_mib: int = 0
    memory_cpu_mib: int = 0
    features: str = ""
    priority: int = 0
    eligible_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    time_limit_s: float | None = None
    preempt_s: float | None = None
    dependency: str = ""
    comment: str = ""
    reservation: str = ""
    requeue: bool = False
    exclusive: bool = False
    shared: bool = False
    required_nodes: str = ""
    excluded_nodes: str = ""
    array_id: int | None = None
    array_task: int | None = None
    array_tasks: str = ""

    @property
    def pending(self) -> bool:
        """Whether it waits."""
        return "pending" in self.states

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return "running" in self.states

    @property
    def grace_end_s(self) -> float | None:
        """When the grace of its preemption ends; None if it is not being preempted.

        Slurm brings the job's end forward to that moment when it begins to preempt it.
        """
        return None if self.preempt_s is None else self.end_s


class Partition(msgspec.Struct, frozen=True):
    """One partition.

    Attributes
    ----------
    nodes : str
        Its nodes, as a host list.
    max_time_s, default_time_s : float or None
        None: no limit, or no default.
    max_nodes : int or None
        Most nodes of one job; None: no limit.
    preempt_mode : str
        What is done with its jobs when others preempt them: ``"off"``, ``"cancel"``, ``"requeue"``, ``"suspend"``.
    grace_s : float
        Time between the first signal and the end.
    """

    name: str
    up: bool = True
    default: bool = False
    nodes: str = ""
    node_count: int = 0
    max_time_s: float | None = None
    default_time_s: float | None = None
    max_nodes: int | None = None
    min_nodes: int = 0
    preempt_mode: str = "off"
    priority_tier: int = 1
    grace_s: float = 0.0
    oversubscribe: str = "no"
    allowed_accounts: str = "all"
    allowed_qos: str = "all"
    qos: str = ""


class Snapshot(msgspec.Struct, frozen=True):
    """All nodes, and all jobs as they were a moment later."""

    nodes: tuple[Node, ...]
    jobs: tuple[QueuedJob, ...]

    def job(self, number: int) -> QueuedJob | None:
        """Return the job with that number."""
        return next((job for job in self.jobs if job.id == number), None)

    def live(self, comments: Container[str]) -> tuple[QueuedJob, ...]:
        """Return the jobs with one of these `comments` that wait or run."""
        return tuple(job for job in self.jobs if job.comment in comments and (job.pending or job.running))

    @property
    def pending(self) -> tuple[QueuedJob, ...]:
        """The jobs that wait."""
        return tuple(job for job in self.jobs if job.pending)
