"""How a sum over several hosts is cut, and who adds up what. Pure.

The array is cut into lanes, as many as the largest host has ranks. For each lane one rank of every host is its *keeper*. A
lane is cut into *buckets*, which travel one after another, and a bucket into pieces, of which each host adds up one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple

from .form import ALIGN_BYTES
from .node import cut
from .order import There, Tree, pairs, united

Hosts = tuple[tuple[int, ...], ...]  # the ranks of each host


class Plan(NamedTuple):
    """Which partial sums each host has, and how they are added up.

    Attributes
    ----------
    counts : tuple of int
        How many sums each host has.
    own : tuple of (tuple of int, Tree)
        For each sum of this host: which of its ranks' partial sums it is made of, and how.
    order : tuple of (int, int)
        Host and number of each operand of the whole sum, in the order of the leaves: of this host the partial sums of its
        ranks, of the others their sums.
    tree : Tree
        How these are added up.
    """

    counts: tuple[int, ...]
    own: tuple[tuple[tuple[int, ...], Tree], ...]
    order: tuple[tuple[int, int], ...]
    tree: Tree

    @property
    def rows(self) -> int:
        """How many pieces' room a bucket needs, on the host that needs most: for sums to each other host, and for theirs."""
        return max(n * (len(self.counts) - 1) + sum(self.counts) - n for n in self.counts)


@lru_cache(maxsize=8)
def plan_of(there: There, hosts: Hosts, host: int) -> Plan:
    """Return the plan of number `host` of the `hosts`."""
    leaves = max(node.stop for nodes in there for node in nodes)
    parts = [[node for rank in ranks for node in there[rank]] for ranks in hosts]
    roots = [
        united(own, [node for i, nodes in enumerate(parts) if i != number for node in nodes], leaves)
        for number, own in enumerate(parts)
    ]
    within = [[i for i, node in enumerate(parts[host]) if root.start <= node.start < root.stop] for root in roots[host]]
    operands = [*roots[:host], parts[host], *roots[host + 1 :]]
    order = sorted((node.start, number, i) for number, nodes in enumerate(operands) for i, node in enumerate(nodes))
    return Plan(
        tuple(len(nodes) for nodes in roots),
        tuple((tuple(indices), pairs(parts[host][i] for i in indices)) for indices in within),
        tuple((number, i) for _, number, i in order),
        pairs(operands[number][i] for _, number, i in order),
    )


class Bucket(NamedTuple):
    """What of a lane travels at a time: for each host the elements that it adds up."""

    lane: int
    pieces: tuple[slice, ...]


def buckets(length: int, itemsize: int, hosts: Hosts, own: Collection[int], piece_bytes: int) -> Iterator[Bucket]:
    """Yield the buckets of an array of `length` elements, of the lanes `own`; no piece has more than `piece_bytes`.

    The order is one for all ranks: those who keep several lanes would else wait for each other.
    """
    lanes = max(len(ranks) for ranks in hosts)
    ends = [cut(length, lanes, lane, itemsize) for lane in range(lanes)]
    line = max(1, ALIGN_BYTES // itemsize)
    longest = max(-(-(stop - start) // line) for start, stop in ends)
    number = -(-longest // (len(hosts) * max(1, piece_bytes // ALIGN_BYTES)))
    for i in range(number):
        for lane in own:
            begin, end = ends[lane]
            start, stop = cut(end - begin, number, i, itemsize)
            pieces = [cut(stop - start, len(hosts), host, itemsize) for host in range(len(hosts))]
            yield Bucket(lane, tuple(slice(begin + start + low, begin + start + high) for low, high in pieces))
