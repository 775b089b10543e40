"""Collectives of messages between two ranks each, all of which can be left when a rank is lost.

MPI's own would do, but for losses: MPICH crashes when it begins to send to a rank whose connection has just broken, and its
own collectives begin to send at any time. Here all is begun at once, when the connections have been looked at
(`Watch.requests`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ..model import Move
from ..partition import blocks
from .messages import FILL_TAG, MEET_TAG, MOVE_TAG, PART_TAG
from .waiting import LARGE_BYTES, Watch, busy, keep

Array = NDArray[np.generic]
NOTHING = bytearray()
PAIR = 2
MEET_BYTES = 8 << 20  # from here on ranks meet before they trade in pieces: pauses slow only the first of these down
PIECE_BYTES = 4 << 20  # no message is longer, so that it is seen whether bytes move


class Collectives:
    """The collectives of a communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator, of which nobody else uses the tags.
    watch : Watch
        Its waits.
    """

    def __init__(self, comm: MPI.Intracomm, watch: Watch) -> None:
        self.comm = comm
        self.watch = watch
        self.rank = comm.rank
        self.size = comm.size
        # The next one first, so that not all send to one at a time.
        self._after = [(self.rank + distance) % self.size for distance in range(1, self.size)]
        self._before = [(self.rank - distance) % self.size for distance in range(1, self.size)]

    # --- all give, all get --------------------------------------------------------------------------------------------

    def gather_all(self, data: bytes) -> list[bytes]:
        """Return what every rank gave, in rank order."""
        lengths = np.empty(self.size, dtype=np.int64)
        self.all_parts(np.array([len(data)]), lengths, [1] * self.size)
        parts = np.empty(int(lengths.sum()), dtype=np.uint8)
        self.all_parts(np.frombuffer(data, dtype=np.uint8), parts, lengths.tolist())
        ends = np.cumsum(lengths)
        return [parts[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None:
        """Gather `counts[r]` elements of every rank r into `out`, on all ranks."""
        self.meet(out.nbytes)
        own, places = _bytes(mine), _cut(_bytes(out), counts, out.itemsize)
        places[self.rank][:] = own
        self._trade([(rank, own) for rank in self._after], [(rank, places[rank]) for rank in self._before], PART_TAG)

    def trade(self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]]) -> None:
        """Send arrays to ranks, and receive into others; what two ranks trade comes in the order in which it is named."""
        self._trade(
            [(rank, _bytes(array)) for rank, array in sends], [(rank, _bytes(array)) for rank, array in receives], PART_TAG
        )

    def exchange(self, sends: list[tuple[Move, Array]], receives: list[tuple[Move, Array]]) -> None:
        """Carry out `moves`; a move's source and target are ranks of this world, its array the rows that go."""
        self._trade(
            [(move.target, _bytes(array)) for move, array in sends],
            [(move.source, _bytes(array)) for move, array in receives],
            MOVE_TAG,
        )

    # --- one gives, all get -------------------------------------------------------------------------------------------

    def fill(self, array: Array, root: int = 0) -> None:
        """Broadcast the contiguous `array` of rank `root` into that of all others."""
        if self.size == 1:
            return
        flat = _bytes(array)
        if self.size <= PAIR or flat.nbytes < LARGE_BYTES:
            self._hand_down(flat, root)
            return
        # Each rank gets a part from the root, and gives it to all others.
        self.meet(flat.nbytes)
        parts = [flat[start:stop] for start, stop in blocks(flat.nbytes, self.size)]
        if self.rank == root:
            self._trade([(rank, parts[rank]) for rank in self._after], [], FILL_TAG)
        else:
            self._trade([], [(root, parts[self.rank])], FILL_TAG)
        lacking = [] if self.rank == root else [(rank, parts[rank]) for rank in self._before]
        self._trade([(rank, parts[self.rank]) for rank in self._after if rank != root], lacking, PART_TAG)

    def tell(self, data: bytes | None, root: int = 0) -> bytes:
        """Broadcast `data` of rank `root` and return it."""
        length = np.array([len(data) if data is not None else 0], dtype=np.int64)
        self.fill(length, root)
        buffer = np.frombuffer(bytearray(data) if data is not None else bytearray(int(length[0])), dtype=np.uint8)
        self.fill(buffer, root)
        return buffer.tobytes()

    def _hand_down(self, flat: memoryview, root: int) -> None:
        """Broadcast along a binomial tree."""
        place = (self.rank - root) % self.size
        reach = 1
        while reach < self.size and not place & reach:
            reach *= 2
        if place:
            self._trade([], [((place - reach + root) % self.size, flat)], FILL_TAG)
        below = []
        while reach > 1:
            reach //= 2
            if place + reach < self.size:
                below.append((place + reach + root) % self.size)
        self._trade([(rank, flat) for rank in below], [], FILL_TAG)

    # --- meeting ------------------------------------------------------------------------------------------------------

    def meet(self, nbytes: int) -> None:
        """Wait for all ranks, with pauses, if what follows moves as much as `nbytes`, which all give alike."""
        if nbytes >= LARGE_BYTES:
            self.barrier()

    def barrier(self, among: Sequence[int] | None = None) -> None:
        """Wait for all ranks, or for those `among` them: in rounds, each hears of twice as many."""
        ranks = range(self.size) if among is None else among
        if len(ranks) == 1:
            return
        place, distance = ranks.index(self.rank), 1
        while distance < len(ranks):
            before, after = ranks[(place - distance) % len(ranks)], ranks[(place + distance) % len(ranks)]
            self.watch.requests(self._both(before, after))
            distance *= 2

    def _both(self, before: int, after: int) -> Iterator[MPI.Request]:
        yield self.comm.Irecv([NOTHING, 0, MPI.BYTE], before, MEET_TAG)
        yield self.comm.Isend([NOTHING, 0, MPI.BYTE], after, MEET_TAG)

    # --- messages -----------------------------------------------------------------------------------------------------

    @contextmanager
    def flight(self, nbytes: int, circles: Iterable[Sequence[int]]) -> Iterator[Flight]:
        """Have messages under way, several trades at a time; all have come when the block is left.

        Parameters
        ----------
        nbytes : int
            How much the ranks move in all. If that is much they meet before.
        circles : iterable of sequence of int
            The ranks that trade with each other; who is in several has them in the same order as the others do.
        """
        meets = nbytes >= MEET_BYTES
        if meets:
            for ranks in circles:
                self.barrier(ranks)
        flight = Flight(self.comm, self.watch, busy(nbytes, MEET_BYTES))
        try:
            yield flight
            flight.wait(flight.requests)
        except BaseException:
            keep(flight.requests)
            raise

    def _trade(self, sends: list[tuple[int, memoryview]], receives: list[tuple[int, memoryview]], tag: int) -> None:
        """Send bytes to ranks and receive others from ranks; where there are none, nothing travels."""
        nbytes = sum(part.nbytes for _, part in sends) + sum(place.nbytes for _, place in receives)
        self.watch.requests(_begun(self.comm, sends, receives, tag), nbytes)


class Flight:
    """Messages under way.

    Parameters
    ----------
    busy_s : float
        For how long a wait for some of them polls without pauses.

    Attributes
    ----------
    requests : list of mpi4py.MPI.Request
        All of them.
    """

    def __init__(self, comm: MPI.Intracomm, watch: Watch, busy_s: float) -> None:
        self._busy_s = busy_s
        self._comm = comm
        self._watch = watch
        self.requests: list[MPI.Request] = []

    def begin(
        self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]], tag: int
    ) -> list[MPI.Request]:
        """Begin to send arrays to ranks, and to receive into others; return what to wait for."""
        parts, places = [(rank, _bytes(array)) for rank, array in sends], [(rank, _bytes(array)) for rank, array in receives]
        requests: list[MPI.Request] = []
        try:
            self._watch.begin(_begun(self._comm, parts, places, tag), requests)
        finally:  # those before one that fails are under way as well
            self.requests += requests
        return requests

    def wait(self, requests: list[MPI.Request]) -> None:
        """Wait for some of them."""
        self._watch.finish(requests, self._busy_s)


def _begun(
    comm: MPI.Intracomm, sends: list[tuple[int, memoryview]], receives: list[tuple[int, memoryview]], tag: int
) -> Iterator[MPI.Request]:
    for rank, place in receives:
        for start in range(0, place.nbytes, PIECE_BYTES):
            yield comm.Irecv(place[start : start + PIECE_BYTES], rank, tag)
    for rank, part in sends:
        for start in range(0, part.nbytes, PIECE_BYTES):
            yield comm.Isend(part[start : start + PIECE_BYTES], rank, tag)


def _bytes(array: Array) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # NumPy says so from Python 3.12 on


def _cut(whole: memoryview, counts: Sequence[int], itemsize: int) -> list[memoryview]:
    """Return the parts of `counts` items each that follow each other."""
    parts, start = [], 0
    for count in counts:
        end = start + int(count) * itemsize
        parts.append(whole[start:end])
        start = end
    return parts
