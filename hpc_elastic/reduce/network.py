"""The sum over ranks of several hosts: partial sums of hosts travel as messages, a piece of them to each host.

A keeper of a lane (see `lanes`) adds up what its host has of it, and trades pieces of that with the keepers on the other
hosts: each adds up one piece of all of them, and they trade the results. That goes bucket by bucket. While the messages of
some travel, the next one is added up, in memory that is used again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import cycle
from typing import Any, Protocol

import numpy as np

from ..arrays.host import Array
from ..comm.board import Board
from ..comm.messages import FILL_TAG, PART_TAG
from ..comm.segments import Bytes
from .adding import add_up
from .form import ALIGN_BYTES, DType, Form, Pool, Slot
from .lanes import Plan, buckets, plan_of
from .node import Near, whole_sum
from .order import There

Trade = list[tuple[int, Array]]
UNDER_WAY = 2  # buckets
ROOM_BYTES = 8 << 20  # for each: what comes from others, and sums that go to them
PIECE_BYTES = 4 << 20  # what a message carries at most


class Flight(Protocol):
    """Messages under way."""

    def begin(self, sends: Trade, receives: Trade, tag: int) -> Any: ...

    def wait(self, begun: Any) -> None: ...


class Messages(Protocol):
    """What the ranks can send each other."""

    rank: int

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None: ...

    def flight(self, nbytes: int, circles: Iterable[Sequence[int]]) -> AbstractContextManager[Flight]: ...


class Network:
    """The transport for ranks of several hosts, or that share no memory."""

    def __init__(self, board: Board, messages: Messages) -> None:
        self._near = Near(board)
        self._messages = messages
        self._hosts, self._host = board.hosts, board.host
        ranks, lanes = board.hosts[board.host], max(len(ranks) for ranks in board.hosts)
        self._lanes = [lane for lane in range(lanes) if lane % len(ranks) == board.place]

    @cached_property
    def _buffers(self) -> Bytes:
        return np.empty((UNDER_WAY, ROOM_BYTES), np.uint8)

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        counts = [len(nodes) * form.nbytes for nodes in there]
        parts = np.empty(sum(counts), np.uint8)
        stretches = [pool.segment.bytes[slot.offset : slot.offset + form.nbytes] for slot in mine]
        self._messages.all_parts(np.concatenate(stretches) if mine else np.empty(0, np.uint8), parts, counts)
        rows = range(sum(len(nodes) for nodes in there))
        return whole_sum(there, [form.slot(parts, row * form.nbytes) for row in rows], pool.own)

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        total, *parts = self._near.meet(form, pool, mine, large=True)
        keepers = {lane: [ranks[lane % len(ranks)] for ranks in self._hosts] for lane in self._lanes}
        plan = plan_of(there, self._hosts, self._host)
        piece_bytes = max(ALIGN_BYTES, min(PIECE_BYTES, ROOM_BYTES // plan.rows))
        rooms = cycle(self._buffers)
        under_way: deque[Crossing] = deque()
        try:
            with self._messages.flight(form.nbytes, keepers.values()) as flight:
                for dtype, whole in total.flat.items():
                    own = [part.flat[dtype] for part in parts]
                    for bucket in buckets(len(whole), dtype.itemsize, self._hosts, self._lanes, piece_bytes):
                        if len(under_way) == UNDER_WAY:
                            under_way.popleft().finish()
                        crossing = Crossing(flight, plan, bucket.pieces, keepers[bucket.lane], self._host, own, whole)
                        crossing.begin(next(rooms))
                        under_way.append(crossing)
                while under_way:
                    under_way.popleft().finish()
            self._near.board.meet()
        except BaseException:
            pool.give_result_up()
            raise
        return total


class Crossing:
    """A bucket on its way: from partial sums of this host, its `own`, and those of others to a part of the `whole` one."""

    def __init__(
        self,
        flight: Flight,
        plan: Plan,
        pieces: Sequence[slice],
        keepers: Sequence[int],
        host: int,
        own: Sequence[Array],
        whole: Array,
    ) -> None:
        self._flight, self._plan, self._host = flight, plan, host
        self._pieces, self._own, self._whole = pieces, own, whole
        self._peers = [(number, rank) for number, rank in enumerate(keepers) if number != host]
        self._sums: dict[int, list[Array]] = {}  # of the others, for this host's piece
        self._begun: Any = None

    def begin(self, memory: Bytes) -> None:
        """Send every host this one's sums of its piece, and be ready for theirs."""
        room = Room(memory)
        sends: Trade = []
        for number, rank in self._peers:
            piece = self._pieces[number]
            for indices, tree in self._plan.own:
                operands = [self._own[i][piece] for i in indices]
                if isinstance(tree, int):
                    sum_of = operands[tree]  # it is sent from where it lies
                else:
                    sum_of = room.take(len(operands[0]), self._whole.dtype)
                    add_up(tree, operands, sum_of)
                sends.append((rank, sum_of))
        length = len(self._whole[self._pieces[self._host]])
        self._sums = {
            number: [room.take(length, self._whole.dtype) for _ in range(self._plan.counts[number])]
            for number, _ in self._peers
        }
        receives = [(rank, sum_of) for number, rank in self._peers for sum_of in self._sums[number]]
        self._begun = self._flight.begin(sends, receives, PART_TAG)

    def finish(self) -> None:
        """When they have come, add up this host's piece, and trade it with the others for theirs."""
        self._flight.wait(self._begun)
        piece = self._pieces[self._host]
        operands = [self._own[i][piece] if number == self._host else self._sums[number][i] for number, i in self._plan.order]
        add_up(self._plan.tree, operands, self._whole[piece])
        sends = [(rank, self._whole[piece]) for _, rank in self._peers]
        receives = [(rank, self._whole[self._pieces[number]]) for number, rank in self._peers]
        self._flight.begin(sends, receives, FILL_TAG)


class Room:
    """Memory from which arrays are taken, one behind the other."""

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory

    def take(self, length: int, dtype: DType) -> Array:
        """Return an array of so many elements."""
        nbytes = length * dtype.itemsize
        array: Array = self._memory[:nbytes].view(dtype)
        self._memory = self._memory[-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES :]
        return array
