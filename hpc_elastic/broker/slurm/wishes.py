"""What a companion needs, and what the queue means for the job: who waits for which nodes. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from . import hosts
from .companions import MARK, Companion
from .room import Room, Waiting, considerate, greedy

if TYPE_CHECKING:
    from .seen import Node, QueuedJob, Snapshot

WAITS_FOR_NODES = ("", "none", "resources", "priority", "reqnodenotavail")
ON_NODES = frozenset({"running", "suspended", "completing", "configuring", "stopped", "signaling", "stage_out"})
LEAST_S = 60.0  # a companion that would have to go sooner is not worth its start


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What a companion needs: the same as the job's own allocation, on one node.

    Attributes
    ----------
    job : int
        Number of the job's own allocation.
    host : str
        Host on which its batch script runs.
    end_s : float or None
        When it ends at the latest, in seconds since 1970.
    cpus : int
        CPUs that the ranks of one node need.
    options : tuple of str
        Further options of these, which win.
    """

    job: int
    host: str
    name: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    features: str = ""
    reservation: str = ""
    gres: str = ""
    end_s: float | None = None
    cpus: int = 1
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: QueuedJob, host: str, cpus: int, options: Sequence[str]) -> Needs:
        """Return the needs of the job whose own allocation is `own`."""
        return cls(
            job=own.id,
            host=host,
            name=own.name,
            partition=next(iter(own.partitions), ""),
            account=own.account,
            qos=own.qos,
            features=own.features,
            reservation=own.reservation,
            gres=own.gres,
            end_s=own.end_s,
            cpus=cpus,
            options=tuple(options),
        )

    def asked(self, now_s: float, exclude: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the options of salloc or sbatch for one companion that is asked for now."""
        found = ["--nodes=1", "--ntasks=1", "--exclusive", f"--job-name={self.name or 'hpc_elastic'}+"]
        for option in ("partition", "account", "qos", "reservation", "gres"):
            value = getattr(self, option)
            if value:
                found.append(f"--{option}={value}")
        if self.features:
            found.append(f"--constraint={self.features}")
        if self.end_s is not None:
            # In whole minutes, which is all that Slurm knows; 0 would mean no limit.
            found.append(f"--time={max(1, int((self.end_s - now_s) / 60))}")
        if exclude:
            found.append(f"--exclude={hosts.folded(exclude)}")
        return (*found, *self.options)


@dataclass(frozen=True)
class Queue:
    """What the queue means for the job.

    Attributes
    ----------
    idle, usable : frozenset of str
        Idle nodes, and those of them that suit a companion and are not planned for somebody else.
    jobs_on : mapping of str to set of int
        Who has nodes, as far as that may be seen.
    waiting : tuple of Waiting
        Pending jobs of others that nodes would help, the first in line first.
    preempted : frozenset of int
        Companions that Slurm has begun to preempt.
    failing : mapping of str to str
        Nodes that can't be relied upon, and how they are.
    end_of : mapping of int to float
        When companions end at the latest.
    own_end_s : float
        When the job's own allocation does.
    """

    idle: frozenset[str] = frozenset()
    usable: frozenset[str] = frozenset()
    jobs_on: Mapping[str, AbstractSet[int]] = field(default_factory=dict)
    waiting: tuple[Waiting, ...] = ()
    preempted: frozenset[int] = frozenset()
    failing: Mapping[str, str] = field(default_factory=dict)
    end_of: Mapping[int, float] = field(default_factory=dict)
    own_end_s: float = float("inf")

    def room(self, live: Mapping[int, str], coming: AbstractSet[str] = frozenset(), *, is_considerate: bool) -> Room:
        """Return what may be taken, and is to be given back, with companions `live` on these nodes.

        Nodes that are `coming` were given back and are idle in a moment: for those who wait, not for the job itself.
        """
        taken = set(live.values())
        idle, usable = (self.idle | coming) - taken, self.usable - taken - coming
        return considerate(idle, usable, live, self.waiting) if is_considerate else greedy(usable)

    def has_back(self, node: str, allocation: int) -> bool:
        """Tell whether Slurm has a node back that was given back: it is idle, or others have it, or nobody can."""
        jobs = self.jobs_on.get(node, frozenset())
        return node in self.idle or node in self.failing or bool(jobs - {allocation})


def seen_from(snapshot: Snapshot, needs: Needs, companions: Mapping[int, Companion]) -> Queue:
    """Return what a `snapshot` means for a job with such needs and companions."""
    of_us = {c.asked.allocation: number for number, c in companions.items() if c.asked.allocation and c.end is None}
    ours = [(of_us[job.id], job) for job in snapshot.jobs if job.id in of_us]
    own = snapshot.job(needs.job)
    end_s = own.end_s if own is not None and own.end_s else needs.end_s
    jobs_on = _jobs_on(snapshot)
    idle = {node.name for node in snapshot.nodes if node.idle and node.name not in jobs_on}
    return Queue(
        idle=frozenset(idle),
        usable=frozenset(n.name for n in snapshot.nodes if n.name in idle and not n.planned and _suits(n, needs)),
        jobs_on=jobs_on,
        waiting=_waiting(snapshot),
        preempted=frozenset(number for number, job in ours if job.preempt_s),
        failing={node.name: _state(node) for node in snapshot.nodes if node.broken},
        end_of={number: job.end_s for number, job in ours if job.end_s},
        own_end_s=end_s or float("inf"),
    )


def _jobs_on(snapshot: Snapshot) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for job in snapshot.jobs:
        if job.states & ON_NODES:
            for name in hosts.names(job.nodes):
                found.setdefault(name, set()).add(job.id)
    return found


def _suits(node: Node, needs: Needs) -> bool:
    return (
        (not needs.partition or needs.partition in node.partitions)
        and node.cpus >= needs.cpus
        and _has(node, needs.features)
    )


def _has(node: Node, features: str) -> bool:
    """Tell whether a node has the `features`; where they can't be told apart, that it may have them."""
    if not features or re.search(r"[^\w,&|.-]", features):
        return True
    return any(set(part.split("&")) <= set(node.features) for part in re.split(r"[|,]", features))


def _state(node: Node) -> str:
    said = "+".join(sorted(node.states))
    return f"{said} ({node.reason})" if node.reason and node.reason != "none" else said


def _waiting(snapshot: Snapshot) -> tuple[Waiting, ...]:
    found, suiting = [], {}  # many jobs of a queue are alike
    for job in sorted(snapshot.pending, key=lambda job: (-job.priority, job.id)):
        reason = job.reason.lower()
        if job.comment.startswith(MARK) or not (reason in WAITS_FOR_NODES or reason.startswith("reqnodenotavail")):
            continue
        wish = job.partitions, job.features, job.required_nodes, job.excluded_nodes
        if wish not in suiting:
            suiting[wish] = _could_use(snapshot, *wish)
        found.append(Waiting(f"job {job.id}", max(job.node_count, 1), suiting[wish]))
    return tuple(found)


def _could_use(snapshot: Snapshot, partitions: Sequence[str], features: str, required: str, excluded: str) -> frozenset[str]:
    """Return the nodes that a job with such wishes could run on."""
    wanted, unwanted = set(hosts.names(required)), set(hosts.names(excluded))
    return frozenset(
        node.name
        for node in snapshot.nodes
        if not node.broken
        and set(partitions) & set(node.partitions)
        and _has(node, features)
        and node.name not in unwanted
        and (not wanted or node.name in wanted)
    )
