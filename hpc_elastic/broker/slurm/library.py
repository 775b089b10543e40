"""Slurm by pyslurm 25.11, for what is read; what is commanded goes by the commands.

Written after pyslurm's documentation, and tested against a stand-in of what that describes, not against pyslurm. It asks
slurmctld in this process, without a time limit of ours, so ask from a thread that nothing waits for. It has nothing like
``salloc --no-shell``, and describes a job in words of its own; hence sbatch and salloc stay in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .decoding import listed, words
from .seen import Node, Partition, QueuedJob, Snapshot
from .text import allowed, refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .commands import Commands


def whole(value: Any) -> int | None:
    """Return an integer; None for None and for the words ``UNLIMITED`` and ``INFINITE``."""
    return int(value) if isinstance(value, int | float) else None


def written(value: Any) -> str:
    """Return resources or dependencies, which pyslurm gives as a mapping or a list, in Slurm's writing."""
    if isinstance(value, dict):
        return ",".join(f"{name}:{count}" for name, count in value.items() if count)
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value or "")


def moment(value: Any) -> float | None:
    """Return a time; None for none."""
    return float(whole(value) or 0) or None


def minutes(value: Any) -> float | None:
    """Return minutes as seconds."""
    number = whole(value)
    return None if number is None else 60.0 * number


def node(raw: Any) -> Node:
    """Return a ``pyslurm.Node`` as `seen` has it."""
    return Node(
        name=raw.name,
        states=words(raw.state),
        cpus=whole(raw.total_cpus) or 0,
        cpus_allocated=whole(raw.allocated_cpus) or 0,
        memory_mib=whole(raw.real_memory) or 0,
        gres=written(raw.configured_gres),
        gres_used=written(raw.allocated_gres),
        partitions=tuple(raw.partitions or ()),
        features=tuple(raw.available_features or ()),
        reason=raw.reason or "",
    )


def job(raw: Any) -> QueuedJob:
    """Return a ``pyslurm.Job`` as `seen` has it."""
    sharing = str(raw.resource_sharing or "").lower()
    dependencies = raw.dependencies if isinstance(raw.dependencies, dict) else {}
    return QueuedJob(
        id=raw.id,
        name=raw.name or "",
        user=raw.user_name or "",
        account=raw.account or "",
        partitions=listed(raw.partition),
        qos=raw.qos or "",
        states=words(raw.state),
        reason="" if raw.state_reason in {None, "None"} else raw.state_reason,
        nodes=raw.allocated_nodes or "",
        node_count=whole(raw.num_nodes) or 0,
        max_nodes=max(whole(raw.max_nodes) or 0, whole(raw.num_nodes) or 0),
        cpus=whole(raw.cpus) or 0,
        gres=written(raw.gres_per_node),
        memory_node_mib=whole(raw.memory_per_node) or 0,
        memory_cpu_mib=whole(raw.memory_per_cpu) or 0,
        features=written(raw.constraints),
        priority=whole(raw.priority) or 0,
        eligible_s=moment(raw.eligible_time),
        start_s=moment(raw.start_time),
        end_s=moment(raw.end_time),
        time_limit_s=minutes(raw.time_limit),
        preempt_s=moment(raw.preempt_time),
        dependency=",".join(f"{kind}:{written(ids)}" for kind, ids in dependencies.items() if ids and kind != "satisfy"),
        comment=raw.comment or "",
        reservation=raw.reservation or "",
        requeue=bool(raw.is_requeueable),
        exclusive=sharing in {"no", "exclusive"},
        shared=sharing in {"yes", "oversubscribe"},
        required_nodes=raw.required_nodes or "",
        excluded_nodes=raw.excluded_nodes or "",
        array_id=raw.array_id or None,
        array_task=raw.array_task_id,
        array_tasks=raw.array_tasks_waiting or "",
    )


def partition(raw: Any) -> Partition:
    """Return a ``pyslurm.Partition`` as `seen` has it."""
    return Partition(
        name=raw.name,
        up=str(raw.state).upper() == "UP",
        default=bool(raw.is_default),
        nodes=raw.nodes or "",
        node_count=whole(raw.total_nodes) or 0,
        max_time_s=minutes(raw.max_time_limit),
        default_time_s=minutes(raw.default_time),
        max_nodes=whole(raw.max_nodes),
        min_nodes=whole(raw.min_nodes) or 0,
        preempt_mode=str(raw.preempt_mode or "off").lower(),
        priority_tier=whole(raw.priority_tier) or 0,
        grace_s=float(whole(raw.preemption_grace_time) or 0),
        oversubscribe=str(raw.oversubscribe or "no").lower(),
        allowed_accounts=allowed(written(raw.allowed_accounts)),
        allowed_qos=allowed(written(raw.allowed_qos)),
        qos=raw.qos or "",
    )


class Library:
    """The implementation that reads without starting a process; see `reading.Slurm`."""

    def __init__(self, pyslurm: Any, commands: Commands) -> None:
        self._pyslurm = pyslurm
        self._commands = commands

    def _ask(self, kind: str) -> Any:
        try:
            return getattr(self._pyslurm, kind).load()
        except self._pyslurm.RPCError as error:
            raise refusal(f"pyslurm.{kind}", str(error), int(error.errno or 1)) from error

    def release(self) -> str:
        """Return the version of Slurm."""
        return self._commands.release()

    def snapshot(self) -> Snapshot:
        """Return all nodes and jobs."""
        nodes = tuple(node(each) for each in self._ask("Nodes").values())
        return Snapshot(nodes, tuple(job(each) for each in self._ask("Jobs").values()))

    def partitions(self) -> tuple[Partition, ...]:
        """Return the partitions."""
        return tuple(partition(each) for each in self._ask("Partitions").values())

    def config(self) -> dict[str, str]:
        """Return the cluster's configuration, from the command, whose names others know."""
        return self._commands.config()

    def own_job(self, number: int) -> QueuedJob | None:
        """Return one job; None if Slurm doesn't know it."""
        try:
            return job(self._pyslurm.Job.load(number))
        except self._pyslurm.RPCError as error:
            if "invalid job id" in str(error).lower():
                return None
            raise refusal("pyslurm.Job", str(error), int(error.errno or 1)) from error

    def submit(self, script: str, options: Sequence[str] = ()) -> int:
        """Submit a script by sbatch; after `SlurmUnreachable` its job may exist all the same."""
        return self._commands.submit(script, options)

    def allocate(self, options: Sequence[str] = (), *, limit_s: float = 60.0) -> int:
        """Wait for nodes by salloc."""
        return self._commands.allocate(options, limit_s=limit_s)

    def cancel(self, numbers: Iterable[int]) -> None:
        """End jobs by scancel."""
        self._commands.cancel(numbers)

    def update(self, number: int, fields: Mapping[str, str]) -> None:
        """Change a job by scontrol."""
        self._commands.update(number, fields)
