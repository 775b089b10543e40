"""Where ranks of one host meet, and tell each other numbers: one page of shared memory for each rank."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ..model import Member
from .segments import PAGE_BYTES, Bytes, Segment, mapped

if TYPE_CHECKING:
    from .collectives import Collectives

# Who sees a counter must see all that was written before it was counted up. Nothing in Python can ask for that, and these
# processors do it unasked.
ORDERED = platform.machine() in ("x86_64", "AMD64")
SPINS = 200  # looks without a pause, some 50 ns each
# Places in a page, in words of 8 bytes; what is written at different times is in different cache lines.
COUNTER, TOKEN, GIVEN, TAKEN, RING, NOTES = 0, 8, 16, 24, 32, 96
RING_WORDS = NOTES - RING
NOTE_WORDS = (PAGE_BYTES // 8 - NOTES) // 2


class Card(msgspec.Struct, frozen=True, array_like=True):
    """How others find a rank's page."""

    descriptor: int
    token: int


class Board:
    """The pages of the ranks of one host.

    Making one is collective over the ranks of all hosts.

    Parameters
    ----------
    comm : Collectives
        The ranks of all hosts.
    members : sequence of Member
        Their processes.

    Attributes
    ----------
    hosts : tuple of tuple of int
        The ranks by host, hosts in the order of their first rank.
    host, place : int
        Which of them is this rank's host, and which of its ranks is this one.
    """

    def __init__(self, comm: Collectives, members: Sequence[Member]) -> None:
        self._comm = comm
        self._segment = Segment()
        self._segment.grow(PAGE_BYTES)
        own = self._segment.bytes.data.cast("q")
        own[TOKEN] = token = int.from_bytes(os.urandom(7), "little")
        mine = msgspec.msgpack.encode(Card(self._segment.descriptor, token))
        cards = [msgspec.msgpack.decode(part, type=Card) for part in comm.gather_all(mine)]
        near = [rank for rank, member in enumerate(members) if member.host == members[comm.rank].host]
        pages = [own if rank == comm.rank else _page(members[rank].pid, cards[rank]) for rank in near]
        reached = comm.gather_all(b"\1" if all(page is not None for page in pages) else b"")
        # Where not all can map all, each is taken for a host by itself.
        keys = [
            (one.host, -1 if all(reached[r] for r, other in enumerate(members) if other.host == one.host) else rank)
            for rank, one in enumerate(members)
        ]
        self.hosts = tuple(tuple(r for r, k in enumerate(keys) if k == key) for key in dict.fromkeys(keys))
        self.host = next(i for i, ranks in enumerate(self.hosts) if comm.rank in ranks)
        self.place = self.hosts[self.host].index(comm.rank)
        self._pids = tuple(members[rank].pid for rank in self.hosts[self.host])
        there = [page for rank, page in zip(near, pages, strict=True) if rank in self.hosts[self.host] and page is not None]
        self._pages = there
        self._own = own
        self._others = [page for place, page in enumerate(there) if place != self.place]
        self._count = self._turn = self._spread = 0

    @property
    def whole(self) -> bool:
        """True if all ranks are on this host and can see what others write: `meet` and `spread` do for messages then."""
        return ORDERED and len(self.hosts) == 1

    def map(self, place: int, descriptor: int, nbytes: int, *, writable: bool = False) -> Bytes:
        """Return memory of the rank in `place`, a segment's."""
        with self._comm.watch.blame(OSError):  # it may have been lost since it told of that
            return mapped(self._pids[place], descriptor, nbytes, writable=writable)

    def meet(self) -> None:
        """Wait for the other ranks of this host; what each has written into its segments before is there then."""
        if not ORDERED:
            self._comm.barrier(self.hosts[self.host])
            return
        self._count = count = self._count + 1
        self._own[COUNTER] = count
        for page in self._others:
            if page[COUNTER] < count:
                self._await(page, COUNTER, count)

    def _await(self, page: memoryview, counter: int, count: int) -> None:
        for _ in range(SPINS):
            if page[counter] >= count:
                return
        self._comm.watch.until(lambda: page[counter] >= count)

    def spread(self, number: int) -> int:
        """Return the `number` of this host's first rank, which may be ahead of the others by some."""
        self._spread = count = self._spread + 1
        cell = RING + count % RING_WORDS
        if self.place:
            first = self._pages[0]
            if first[GIVEN] < count:
                self._await(first, GIVEN, count)
            number = first[cell]
            self._own[TAKEN] = count
            return number
        for page in self._others:
            if page[TAKEN] <= count - RING_WORDS:
                self._await(page, TAKEN, count - RING_WORDS + 1)
        self._own[cell] = number
        self._own[GIVEN] = count
        return number

    def tell(self, numbers: Sequence[int]) -> None:
        """Tell the others up to 207 `numbers`, which they have after the next meeting, and keep until the next but one."""
        start = NOTES + self._turn % 2 * NOTE_WORDS
        self._turn += 1
        self._own[start] = len(numbers)
        for place, number in enumerate(numbers, start + 1):
            self._own[place] = number

    def told(self) -> list[list[int]]:
        """Return what every rank of this host, this one too, has told last."""
        start = NOTES + (self._turn - 1) % 2 * NOTE_WORDS + 1
        return [page[start : start + page[start - 1]].tolist() for page in self._pages]


def _page(pid: int, card: Card) -> memoryview | None:
    """Return a rank's page, if it is the right one: process numbers can be those of another container's."""
    try:
        page: Bytes = mapped(pid, card.descriptor, PAGE_BYTES)
    except OSError:
        return None
    words = page.data.cast("q")
    return words if words[TOKEN] == card.token else None
