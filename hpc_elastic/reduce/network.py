"""The sum over ranks of several hosts: partial sums of hosts travel as messages, a piece of them to each host.

The array is cut into lanes, as many as the largest host has ranks. For each lane one rank of every host, its *keeper*, adds
up what its host has, and trades pieces of that with the keepers of the other hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ..arrays.host import Array
from ..comm.board import Board
from .adding import add_up
from .form import Form, Pool, Slot
from .node import Near, cut, whole_sum
from .order import There, Tree, pairs, united

Trade = list[tuple[int, Array]]


class Messages(Protocol):
    """What the ranks can send each other."""

    rank: int

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None: ...

    def trade(self, sends: Trade, receives: Trade) -> None: ...

    def meet(self, nbytes: int) -> None: ...


class Network:
    """The transport for ranks of several hosts, or that share no memory."""

    def __init__(self, board: Board, messages: Messages) -> None:
        self._near = Near(board)
        self._messages = messages
        self._hosts, self._host = board.hosts, board.host
        self._lanes = max(len(ranks) for ranks in board.hosts)
        ranks = board.hosts[board.host]
        self._own = [lane for lane in range(self._lanes) if lane % len(ranks) == board.place]

    def _keeper(self, host: int, lane: int) -> int:
        ranks = self._hosts[host]
        return ranks[lane % len(ranks)]

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        counts = [len(nodes) * form.nbytes for nodes in there]
        parts = np.empty(sum(counts), np.uint8)
        stretches = [pool.segment.bytes[slot.offset : slot.offset + form.nbytes] for slot in mine]
        self._messages.all_parts(np.concatenate(stretches) if mine else np.empty(0, np.uint8), parts, counts)
        rows = range(sum(len(nodes) for nodes in there))
        return whole_sum(there, [form.slot(parts, row * form.nbytes) for row in rows], pool.own)

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        total, *parts = self._near.meet(form, pool, mine, large=True)
        self._messages.meet(form.nbytes)
        plan = _plan(there, self._hosts, self._host)
        others = [host for host in range(len(self._hosts)) if host != self._host]
        sends: Trade = []
        receives: Trade = []
        # Lane, what is cut into pieces, these, and the sums that each host has for our piece.
        work: list[tuple[int, Array, list[slice], list[list[Array]]]] = []
        for lane in self._own:
            for dtype, whole in total.flat.items():
                pieces = self._pieces(len(whole), lane, whole.itemsize)
                sums = [[np.empty_like(whole[pieces[self._host]]) for _ in range(n)] for n in plan.counts]
                for host, piece in enumerate(pieces):
                    rows = sums[host] if host == self._host else [np.empty_like(whole[piece]) for _ in plan.own]
                    for (indices, tree), row in zip(plan.own, rows, strict=True):
                        add_up(tree, [parts[i].flat[dtype][piece] for i in indices], row)
                    if host != self._host:
                        sends += [(self._keeper(host, lane), row) for row in rows]
                        receives += [(self._keeper(host, lane), row) for row in sums[host]]
                work.append((lane, whole, pieces, sums))
        self._messages.trade(sends, receives)
        sends, receives = [], []
        for lane, whole, pieces, sums in work:
            out = whole[pieces[self._host]]
            add_up(plan.tree, [sums[host][i] for host, i in plan.order], out)
            sends += [(self._keeper(host, lane), out) for host in others]
            receives += [(self._keeper(host, lane), whole[pieces[host]]) for host in others]
        self._messages.trade(sends, receives)
        self._near.board.meet()
        return total

    def _pieces(self, length: int, lane: int, itemsize: int) -> list[slice]:
        """Return what each host adds up of a lane."""
        begin, end = cut(length, self._lanes, lane, itemsize)
        hosts = len(self._hosts)
        cuts = [cut(end - begin, hosts, host, itemsize) for host in range(hosts)]
        return [slice(begin + start, begin + stop) for start, stop in cuts]


class Plan(NamedTuple):
    """Who has which sums, and how they are added up.

    Attributes
    ----------
    counts : tuple of int
        How many sums each host has.
    own : tuple of (list of int, Tree)
        For each sum of this host: which of its ranks' partial sums it is made of, and how.
    order : tuple of (int, int)
        Host and number of each sum, in the order of the leaves.
    tree : Tree
        How these are added up.
    """

    counts: tuple[int, ...]
    own: tuple[tuple[list[int], Tree], ...]
    order: tuple[tuple[int, int], ...]
    tree: Tree


@lru_cache(maxsize=8)
def _plan(there: There, hosts: tuple[tuple[int, ...], ...], host: int) -> Plan:
    leaves = max(node.stop for nodes in there for node in nodes)
    parts = [[node for rank in ranks for node in there[rank]] for ranks in hosts]
    roots = [
        united(own, [node for i, nodes in enumerate(parts) if i != number for node in nodes], leaves)
        for number, own in enumerate(parts)
    ]
    within = [[i for i, node in enumerate(parts[host]) if root.start <= node.start < root.stop] for root in roots[host]]
    order = sorted((node.start, number, i) for number, nodes in enumerate(roots) for i, node in enumerate(nodes))
    return Plan(
        tuple(len(nodes) for nodes in roots),
        tuple((indices, pairs(parts[host][i] for i in indices)) for indices in within),
        tuple((number, i) for _, number, i in order),
        pairs(roots[number][i] for _, number, i in order),
    )
