"""The sum over ranks of several hosts: partial sums of hosts travel as messages, a piece of them to each host.

The array is cut into lanes, as many as the largest host has ranks. For each lane one rank of every host, its *keeper*, adds
up what its host has, and trades pieces of that with the keepers of the other hosts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ..arrays.host import Array
from ..comm.board import Board
from ..comm.messages import FILL_TAG, PART_TAG
from .adding import add_up
from .form import DType, Form, Pool, Slot
from .node import Near, cut, whole_sum
from .order import There, Tree, pairs, united

Trade = list[tuple[int, Array]]
PIECE_BYTES = 1 << 20  # the most that one message carries of a large sum
BUFFER_BYTES = 16 << 20  # and what a rank keeps for them, whatever the sum's size
AHEAD = 2  # buckets that are begun before the first of them has come
DIRECT = False


class Flight(Protocol):
    """Messages under way."""

    def begin(self, sends: Trade, receives: Trade, tag: int) -> object: ...

    def wait(self, ticket: object) -> None: ...


class Messages(Protocol):
    """What the ranks can send each other."""

    rank: int

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None: ...

    def flight(self) -> AbstractContextManager[Flight]: ...

    def meet(self, nbytes: int, among: Sequence[int] | None = None) -> None: ...


class Bucket(NamedTuple):
    """A part of a lane that travels at a time.

    Attributes
    ----------
    peers : list of int
        The lane's keepers, by host.
    dtype : numpy.dtype
        Of which values it is.
    pieces : list of slice
        What each host adds up of it.
    """

    peers: list[int]
    dtype: DType
    pieces: list[slice]


class Network:
    """The transport for ranks of several hosts, or that share no memory."""

    def __init__(self, board: Board, messages: Messages) -> None:
        self._near = Near(board)
        self._messages = messages
        self._hosts, self._host = board.hosts, board.host
        self._lanes = max(len(ranks) for ranks in board.hosts)
        ranks = board.hosts[board.host]
        self._own = [lane for lane in range(self._lanes) if lane % len(ranks) == board.place]
        self._buffers = np.empty(0, np.uint8)

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
        hosts, host = len(self._hosts), self._host
        others = [number for number in range(hosts) if number != host]
        plan = _plan(there, self._hosts, host)
        for lane in self._own:
            self._messages.meet(form.nbytes, [self._keeper(number, lane) for number in range(hosts)])
        # What a bucket needs at most on any host: its own sums for each other host, and theirs.
        rows = max(n * (1 if DIRECT else hosts - 1) + sum(plan.counts) - n for n in plan.counts)
        piece_bytes = min(PIECE_BYTES, BUFFER_BYTES // (rows * (AHEAD + 1)))
        if not len(self._buffers):
            self._buffers = np.empty(BUFFER_BYTES, np.uint8)
        waiting: deque[tuple[Bucket, object, list[list[Array]]]] = deque()

        def complete() -> None:
            bucket, ticket, sums = waiting.popleft()
            flight.wait(ticket)
            flat = total.flat[bucket.dtype]
            piece = bucket.pieces[host]
            own = [part.flat[bucket.dtype][piece] for part in parts]
            out = flat[piece]
            add_up(plan.tree, [own[i] if number == host else sums[number][i] for number, i in plan.order], out)
            if not DIRECT:
                flight.begin(
                    [(bucket.peers[other], out) for other in others],
                    [(bucket.peers[other], flat[bucket.pieces[other]]) for other in others],
                    FILL_TAG,
                )

        with self._messages.flight() as flight:
            for number, bucket in enumerate(self._buckets(total, piece_bytes)):
                start = number % (AHEAD + 1) * (rows * piece_bytes)
                if len(waiting) > AHEAD:
                    complete()
                place = start

                def row(piece: slice) -> Array:
                    nonlocal place
                    length = piece.stop - piece.start
                    begin, place = place, place + -(-length * bucket.dtype.itemsize // 64) * 64
                    return self._buffers[begin : begin + length * bucket.dtype.itemsize].view(bucket.dtype)

                sends: Trade = []
                for other in others:
                    piece = bucket.pieces[other]
                    for indices, tree in plan.own:
                        if isinstance(tree, int):
                            own = parts[indices[tree]].flat[bucket.dtype][piece]
                        else:
                            if DIRECT and other != others[0]:
                                raise RuntimeError
                            own = row(piece)
                            add_up(tree, [parts[i].flat[bucket.dtype][piece] for i in indices], own)
                        sends.append((bucket.peers[other], own))
                sums = [[] if n == host else [row(bucket.pieces[host]) for _ in range(plan.counts[n])] for n in range(hosts)]
                receives = [(bucket.peers[n], s) for n in others for s in sums[n]]
                waiting.append((bucket, flight.begin(sends, receives, PART_TAG), sums))
            while waiting:
                complete()
        self._near.board.meet()
        return total

    def _buckets(self, total: Slot, piece_bytes: int) -> Iterator[Bucket]:
        """Yield those of this rank's lanes; in one order for all lanes, so that keepers of several don't wait for each other."""
        hosts = range(len(self._hosts))
        for dtype, flat in total.flat.items():
            lanes = [cut(len(flat), self._lanes, lane, dtype.itemsize) for lane in range(self._lanes)]
            longest = -(-max(stop - start for start, stop in lanes) * dtype.itemsize // 64)
            count = -(-longest // ((1 if DIRECT else len(hosts)) * (piece_bytes // 64)))
            for number in range(count):
                for lane in self._own:
                    begin, end = lanes[lane]
                    start, stop = cut(end - begin, count, number, dtype.itemsize)
                    cuts = [cut(stop - start, len(hosts), host, dtype.itemsize) for host in hosts]
                    pieces = [slice(begin + start + a, begin + start + b) for a, b in cuts]
                    if DIRECT:
                        pieces = [slice(begin + start, begin + stop)] * 2
                    yield Bucket([self._keeper(host, lane) for host in hosts], dtype, pieces)


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
    nodes = [*roots[:host], parts[host], *roots[host + 1 :]]
    order = sorted((node.start, number, i) for number, there in enumerate(nodes) for i, node in enumerate(there))
    return Plan(
        tuple(len(nodes) for nodes in roots),
        tuple((indices, pairs(parts[host][i] for i in indices)) for indices in within),
        tuple((number, i) for _, number, i in order),
        pairs(nodes[number][i] for _, number, i in order),
    )
