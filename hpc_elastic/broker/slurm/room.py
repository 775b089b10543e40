"""Which idle nodes the job may take, and which of its companions it should give back, as the queue stands. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A pending job of somebody's that nodes would help.

    Attributes
    ----------
    name : str
        The job, for people.
    nodes : int
        How many nodes it needs to start.
    could_use : frozenset of str
        The nodes that it could run on.
    """

    name: str
    nodes: int
    could_use: frozenset[str]


@dataclass(frozen=True)
class Room:
    """What is to be had, and what is to be given back.

    Attributes
    ----------
    free : tuple of str
        Idle nodes that the job may take.
    back : tuple of int
        Companions to be given back.
    why : str
        What limits the one, or asks for the other, for people.
    """

    free: tuple[str, ...]
    back: tuple[int, ...] = ()
    why: str = ""


def considerate(
    idle: AbstractSet[str], usable: AbstractSet[str], companions: Mapping[int, str], waiting: Sequence[Waiting]
) -> Room:
    """Return the room that leaves every pending job what it could start with.

    A pending job that could start on idle nodes will do so in a moment: these are left to it. One that could start if the
    job gave some of its nodes back gets them. One that could not start even then loses nothing by the job's being there.

    Parameters
    ----------
    idle : set of str
        All idle nodes.
    usable : set of str
        Those that suit the job's own ranks.
    companions : mapping of int to str
        The job's companions and their nodes; the last ones go first.
    waiting : sequence of Waiting
        Pending jobs of others, the first in line first.
    """
    left, held, back, reasons = set(idle), dict(companions), [], []
    for job in waiting:
        there = left & job.could_use
        missing = job.nodes - len(there)
        if missing > len(held):
            continue
        mine = [number for number in sorted(held, reverse=True) if held[number] in job.could_use]
        if missing > len(mine):
            continue
        # What the job can't use itself goes first.
        left -= set(sorted(there, key=lambda node: (node in usable, node))[: job.nodes])
        if missing > 0:
            for number in mine[:missing]:
                del held[number]
                back.append(number)
            reasons.append(f"{job.name} could start with {missing} more node{'s' if missing > 1 else ''}")
    free = tuple(sorted(left & usable))
    taken = len(idle & usable) - len(free)
    said = f"{len(free)} idle nodes" if len(free) != 1 else "1 idle node"
    if taken:
        said += f", {taken} left to pending jobs"
    return Room(free, tuple(back), "; ".join(reasons) or said)


def greedy(usable: AbstractSet[str]) -> Room:
    """Return the room that takes all there is."""
    return Room(tuple(sorted(usable)), (), f"{len(usable)} idle node{'s' if len(usable) != 1 else ''}")
