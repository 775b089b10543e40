"""The JSON of squeue and sinfo, from Slurm 22.05 to 26.05, read into what `seen` has.

It changed between versions; each difference is met in one place here:

- a number was plain, with null for none; from 23.02 on it is ``{"set": …, "infinite": …, "number": …}``;
- states and sharing were one word; later they are lists, and flags of a node stand among its states;
- sinfo gave ``nodes``, one entry a node; from 23.11 on it gives ``sinfo``, with ``-N`` one entry a node *and partition*;
- sharing was told, and is not in 26.05 (`sharing`);
- a node's reason was text; later it is an object with a description.

Fields that are not named here are skipped without being built, which is most of the time saved.
"""

from __future__ import annotations

import msgspec

from ...errors import SlurmError
from .seen import Node, QueuedJob
from .text import refusal

# NO_VAL and INFINITE of slurm.h, in 16, 32 and 64 bits
NO_VALUES = frozenset({0xFFFE, 0xFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFE, 0xFFFFFFFFFFFFFFFF})
WORDS = {"maint": "maintenance", "res": "reserved", "no_respond": "not_responding", "alloc": "allocated", "mix": "mixed"}


class Wrapped(msgspec.Struct):
    """A number of 23.02 and later."""

    set: bool = True
    infinite: bool = False
    number: float | int = 0


Number = int | float | str | Wrapped | None
Words = str | list[str] | None


class Whole(msgspec.Struct):
    """Of a job that runs: whether its nodes are all its own."""

    whole: bool | None = False


class Has(msgspec.Struct):
    """Of a job that runs: what it has."""

    nodes: Whole | str | list[msgspec.Raw] | None = None


class RawJob(msgspec.Struct):
    """A job of squeue."""

    job_id: Number
    name: str | None = ""
    user_name: str | None = ""
    account: str | None = ""
    partition: str | None = ""
    qos: str | None = ""
    job_state: Words = None
    state_reason: str | None = ""
    nodes: str | None = ""
    node_count: Number = 0
    max_nodes: Number = 0
    cpus: Number = 0
    tres_req_str: str | None = ""
    tres_per_node: str | None = ""
    tres_per_job: str | None = ""
    tres_per_task: str | None = ""
    tres_per_socket: str | None = ""
    memory_per_node: Number = None
    memory_per_cpu: Number = None
    features: str | None = ""
    priority: Number = 0
    eligible_time: Number = 0
    start_time: Number = 0
    end_time: Number = 0
    time_limit: Number = None
    preempt_time: Number = 0
    dependency: str | None = ""
    comment: str | None = ""
    resv_name: str | None = ""
    requeue: bool | None = False
    shared: Words = None
    exclusive: Words | bool = None
    job_resources: Has | list[msgspec.Raw] | None = None
    submit_line: str | None = ""
    required_nodes: str | None = ""
    excluded_nodes: str | None = ""
    array_job_id: Number = 0
    array_task_id: Number = None
    array_task_string: str | None = ""


class RawNode(msgspec.Struct):
    """A node of sinfo up to 23.02."""

    name: str
    state: Words = None
    state_flags: list[str] = []
    cpus: Number = 0
    alloc_cpus: Number = 0
    real_memory: Number = 0
    gres: str | None = ""
    gres_used: str | None = ""
    partitions: list[str] = []
    features: Words = None
    reason: str | None = ""


class State(msgspec.Struct):
    """Of a row of sinfo."""

    state: Words = None


class Named(msgspec.Struct):
    """Of a row of sinfo."""

    nodes: list[str] = []


class Partitioned(msgspec.Struct):
    """Of a row of sinfo."""

    name: str | None = ""


class Counted(msgspec.Struct):
    """Of a row of sinfo: the CPUs of all its nodes."""

    allocated: Number = 0
    total: Number = 0


class Extent(msgspec.Struct):
    """Of a row of sinfo."""

    minimum: Number = 0


class Resources(msgspec.Struct):
    """Of a row of sinfo."""

    total: str | None = ""
    used: str | None = ""


class Described(msgspec.Struct):
    """A reason of 24.05 and later."""

    description: str | None = ""


class RawRow(msgspec.Struct):
    """A row of sinfo from 23.11 on."""

    node: State = msgspec.field(default_factory=State)
    nodes: Named = msgspec.field(default_factory=Named)
    partition: Partitioned | None = None
    cpus: Counted = msgspec.field(default_factory=Counted)
    memory: Extent = msgspec.field(default_factory=Extent)
    gres: Resources = msgspec.field(default_factory=Resources)
    features: Resources = msgspec.field(default_factory=Resources)
    reason: str | Described | None = ""


class Problem(msgspec.Struct):
    """An entry of ``errors``: newer versions tell trouble there and may end with code 0 all the same."""

    description: str | None = ""
    error: str | None = ""


class RawQueue(msgspec.Struct):
    """What squeue prints."""

    jobs: list[RawJob] | None = None
    errors: list[Problem] = []


class RawNodes(msgspec.Struct):
    """What sinfo prints."""

    nodes: list[RawNode] | None = None
    sinfo: list[RawRow] | None = None
    errors: list[Problem] = []


QUEUE = msgspec.json.Decoder(RawQueue)
NODES = msgspec.json.Decoder(RawNodes)


def number(value: Number) -> int | None:
    """Return a number in any of its forms; None for none or no limit."""
    if isinstance(value, Wrapped):
        return int(value.number) if value.set and not value.infinite else None
    if value is None:
        return None
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdigit() else None
    return None if value in NO_VALUES else int(value)


def moment(value: Number) -> float | None:
    """Return a time; Slurm writes 0 where there is none."""
    return float(number(value) or 0) or None


def words(value: Words) -> frozenset[str]:
    """Return states in any of their forms, lower case, the names of old versions as in new ones."""
    parts = [value] if isinstance(value, str) else value or []
    found: set[str] = set()
    for word in (word for part in parts for word in part.lower().split("+")):
        name = word.rstrip("*~#!%$@^-")  # the marks of sinfo's short form; "*" is the one that matters
        found.update({WORDS.get(name, name)} if name else ())
        found.update({"not_responding"} if word.endswith("*") else ())
    return frozenset(found)


def listed(value: Words) -> tuple[str, ...]:
    """Return names that are separated by commas or stand in a list."""
    return tuple(part for part in (value.split(",") if isinstance(value, str) else value or []) if part)


def sharing(raw: RawJob) -> tuple[bool, bool]:
    """Return whether a job wants its nodes alone, and whether it shares CPUs.

    26.05 leaves ``shared`` empty. There a running job's nodes are marked as whole, and of a waiting one only its command
    line tells; ``#SBATCH --exclusive`` in its script is not seen.
    """
    said = words(raw.shared)
    alone = raw.exclusive if isinstance(raw.exclusive, bool) else bool({"true", "none"} & words(raw.exclusive))
    has = raw.job_resources.nodes if isinstance(raw.job_resources, Has) else None
    whole = isinstance(has, Whole) and bool(has.whole)
    options = (raw.submit_line or "").split(" --wrap")[0].split()
    return (
        "none" in said or alone or whole or "--exclusive" in options,
        "oversubscribe" in said or "--oversubscribe" in options or "-s" in options,
    )


def job(raw: RawJob) -> QueuedJob:
    """Return a job as `seen` has it."""
    limit_min = number(raw.time_limit)
    exclusive, shared = sharing(raw)
    asked = (raw.tres_per_job, raw.tres_per_node, raw.tres_per_socket, raw.tres_per_task)
    return QueuedJob(
        id=number(raw.job_id) or 0,
        name=raw.name or "",
        user=raw.user_name or "",
        account=raw.account or "",
        partitions=listed(raw.partition),
        qos=raw.qos or "",
        states=words(raw.job_state),
        reason="" if raw.state_reason in {None, "None"} else raw.state_reason or "",
        nodes=raw.nodes or "",
        node_count=number(raw.node_count) or 0,
        max_nodes=max(number(raw.max_nodes) or 0, number(raw.node_count) or 0),
        cpus=number(raw.cpus) or 0,
        tres=raw.tres_req_str or "",
        gres=",".join(part for part in asked if part),
        memory_node_mib=number(raw.memory_per_node) or 0,
        memory_cpu_mib=number(raw.memory_per_cpu) or 0,
        features=raw.features or "",
        priority=number(raw.priority) or 0,
        eligible_s=moment(raw.eligible_time),
        start_s=moment(raw.start_time),
        end_s=moment(raw.end_time),
        time_limit_s=None if limit_min is None else 60.0 * limit_min,
        preempt_s=moment(raw.preempt_time),
        dependency=raw.dependency or "",
        comment=raw.comment or "",
        reservation=raw.resv_name or "",
        requeue=bool(raw.requeue),
        exclusive=exclusive,
        shared=shared,
        required_nodes=raw.required_nodes or "",
        excluded_nodes=raw.excluded_nodes or "",
        array_id=number(raw.array_job_id) or None,
        array_task=number(raw.array_task_id),
        array_tasks=raw.array_task_string or "",
    )


def node(raw: RawNode) -> Node:
    """Return a node of an older version as `seen` has it."""
    return Node(
        name=raw.name,
        states=words(raw.state) | words(raw.state_flags),
        cpus=number(raw.cpus) or 0,
        cpus_allocated=number(raw.alloc_cpus) or 0,
        memory_mib=number(raw.real_memory) or 0,
        gres=raw.gres or "",
        gres_used=raw.gres_used or "",
        partitions=tuple(raw.partitions),
        features=listed(raw.features),
        reason=raw.reason or "",
    )


def by_node(rows: list[RawRow]) -> tuple[Node, ...]:
    """Return the nodes of rows that have one node and one partition each."""
    first: dict[str, RawRow] = {}
    partitions: dict[str, list[str]] = {}
    for row in rows:
        for name in row.nodes.nodes:
            first.setdefault(name, row)
            partitions.setdefault(name, []).extend(listed(row.partition.name if row.partition else None))
    return tuple(
        Node(
            name=name,
            states=words(row.node.state),
            cpus=(number(row.cpus.total) or 0) // max(1, len(row.nodes.nodes)),
            cpus_allocated=(number(row.cpus.allocated) or 0) // max(1, len(row.nodes.nodes)),
            memory_mib=number(row.memory.minimum) or 0,
            gres=row.gres.total or "",
            gres_used=row.gres.used or "",
            partitions=tuple(dict.fromkeys(partitions[name])),
            features=listed(row.features.total),
            reason=(row.reason.description if isinstance(row.reason, Described) else row.reason) or "",
        )
        for name, row in first.items()
    )


def complain(command: str, problems: list[Problem], stderr: str) -> None:
    """Raise what a command tells in ``errors``."""
    told = "\n".join([text for p in problems for text in (p.description, p.error) if text] + [stderr])
    if problems:
        raise refusal(command, told, 0)


def jobs(text: bytes, stderr: str = "") -> tuple[QueuedJob, ...]:
    """Return the jobs of ``squeue --json``; a `SlurmError` if it tells of trouble or can't be read."""
    try:
        raw = QUEUE.decode(text)
    except msgspec.DecodeError as error:
        raise SlurmError(f"squeue --json can't be read: {error}. Is this Slurm 22.05 or newer, with JSON?") from error
    complain("squeue", raw.errors, stderr)
    return tuple(job(each) for each in raw.jobs or ())


def nodes(text: bytes, stderr: str = "") -> tuple[Node, ...]:
    """Return the nodes of ``sinfo -N --json``; a `SlurmError` if it tells of trouble or can't be read."""
    try:
        raw = NODES.decode(text)
    except msgspec.DecodeError as error:
        raise SlurmError(f"sinfo --json can't be read: {error}. Is this Slurm 22.05 or newer, with JSON?") from error
    complain("sinfo", raw.errors, stderr)
    return by_node(raw.sinfo) if raw.sinfo is not None else tuple(node(each) for each in raw.nodes or ())
