"""The world of one generation: its communicators, its collectives, and how it becomes the next one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from ..model import Generation, Member, Move
from .liveness import DEAF_S, Deaf
from .messages import BRIDGE_TAG, Party
from .user import UserComm
from .vendor import Vendor, own_shared_memory, under_launcher, unmapped, vendor_of
from .waiting import LeftOut, Lost, Watch, end_in_time, forsaken, limited

T = TypeVar("T")
Array = NDArray[np.generic]
MOVE_TAG, GREETING_TAG = 20, 21
LARGE_BYTES = 1 << 20  # from here on ranks meet before they send: who polls for much data without pauses must not wait long
LONGEST_FINALIZE_S = 30


def vendor() -> Vendor:
    """Return the vendor of the MPI that is loaded."""
    found = vendor_of(MPI.Get_library_version())
    assert found is not None, "an MPI of this kind is refused at the start"
    return found


def library() -> str:
    """Return name and version of the MPI that is loaded, in one line."""
    return MPI.Get_library_version().split("\n")[0].split(",")[0].replace("\t", " ").rstrip("\0 ")


def together(watch: Watch, members: Sequence[Member], call: Callable[[], T]) -> T:
    """Make a `call` of MPI's that brings `members` together, so that this process outlives the loss of one of them."""
    with watch.blame():
        if vendor().calls_apart:
            return watch.apart(call)
        with watch.blocking(members):
            return call()


LAUNCHED = under_launcher()  # asked now, since Open MPI sets such variables itself in MPI_Init


def must_stay() -> bool:
    """Tell whether this process can't end before the others do.

    It shares its MPI world with others, or no launcher started it and it is the parent of theirs: Open MPI's ends with it,
    MPICH's kills its process group at the end, which is that of the shell script it runs in.
    """
    return MPI.COMM_WORLD.size > 1 or not LAUNCHED


def finalize() -> None:
    """End MPI in this process. Removes what a single process of Open MPI leaves in shared memory.

    A process that can't end MPI, since a thread of it is left in a call, ends without: its guard tells the launcher.
    """
    if forsaken():
        for path in own_shared_memory():
            path.unlink(missing_ok=True)
        end_in_time()
        return
    if MPI.Is_initialized() and not MPI.Is_finalized():
        segments = own_shared_memory()
        with limited(LONGEST_FINALIZE_S):
            MPI.Finalize()
        for path in unmapped([path for path in segments if path.exists()]):
            path.unlink(missing_ok=True)
        end_in_time()


class World:
    """The ranks of one generation.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        The runtime's own communicator.
    user : mpi4py.MPI.Intracomm
        A copy of it for the user's messages.
    generation : Generation
        Who is in it.
    """

    def __init__(self, comm: MPI.Intracomm, generation: Generation, watch: Watch) -> None:
        self.comm = comm
        self.generation = generation
        self.watch = watch
        self.rank = comm.rank
        self.size = comm.size
        self._user: MPI.Intracomm | None = None
        self._marked: UserComm | None = None

    @classmethod
    def of_seeds(cls, watch: Watch) -> World:
        """Return the first generation: the ranks that the launcher started. Collective."""
        comm = MPI.COMM_WORLD.Dup()
        mine = Member(id=comm.rank, pid=os.getpid(), host=socket.gethostname(), slot=comm.rank, parks=must_stay())
        world = cls(comm, Generation(0, (mine,)), watch)
        members = tuple(msgspec.msgpack.decode(part, type=Member) for part in world.gather_all(msgspec.msgpack.encode(mine)))
        world.generation = Generation(0, members)
        world.open_user()
        return world

    def open_user(self) -> None:
        """Make the user's communicator. Collective."""
        if vendor().shrinks:
            # ULFM ends this call on a loss; an Idup that can't end keeps Open MPI from making any other communicator.
            self._user = together(self.watch, self.generation.members, self.comm.Dup)
        else:
            self._user, request = self.comm.Idup()
            self.watch.request(request)

    @property
    def user(self) -> MPI.Intracomm:
        """The user's communicator."""
        assert self._user is not None
        if self._marked is None:
            self._marked = UserComm.marked(self._user, self.watch.users, self.generation.members)
        return self._marked

    @property
    def me(self) -> Member:
        """The process that this rank is."""
        return self.generation.members[self.rank]

    # --- collectives, all of which can be left when the job fails -----------------------------------------------------

    def fill(self, array: Array, root: int = 0) -> None:
        """Broadcast the contiguous `array` of rank `root` into that of all others."""
        if self.size > 1:
            self.meet(array.nbytes)
            self.watch.request(self.comm.Ibcast([array.view(np.uint8).reshape(-1), MPI.BYTE], root=root), array.nbytes)

    def tell(self, data: bytes | None, root: int = 0) -> bytes:
        """Broadcast `data` of rank `root` and return it."""
        length = np.array([len(data) if data is not None else 0], dtype=np.int64)
        self.fill(length, root)
        buffer = np.frombuffer(bytearray(data) if data is not None else bytearray(int(length[0])), dtype=np.uint8)
        self.fill(buffer, root)
        return buffer.tobytes()

    def gather_all(self, data: bytes) -> list[bytes]:
        """Return what every rank gave, in rank order."""
        if self.size == 1:
            return [data]
        lengths = np.empty(self.size, dtype=np.int64)
        mine = np.array([len(data)], dtype=np.int64)
        self.watch.request(self.comm.Iallgather(mine, lengths))
        parts = np.empty(int(lengths.sum()), dtype=np.uint8)
        self.all_parts(np.frombuffer(data, dtype=np.uint8), parts, lengths.tolist())
        ends = np.cumsum(lengths)
        return [parts[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None:
        """Gather `counts[r]` elements of every rank r into `out`, on all ranks."""
        self.meet(out.nbytes)
        self.watch.request(
            self.comm.Iallgatherv([_bytes(mine), MPI.BYTE], [_bytes(out), _scaled(counts, out.itemsize), None, MPI.BYTE]),
            out.nbytes,
        )

    def swap_parts(self, mine: Array, counts: Sequence[int], out: Array, out_counts: Sequence[int]) -> None:
        """Send ``counts[r]`` elements to every rank r, and receive ``out_counts[r]`` from it, both in rank order."""
        # MPICH moves a rank's own part by 8 KB a poll: it stays out of the call.
        given, taken, me = np.cumsum([0, *counts]), np.cumsum([0, *out_counts]), self.rank
        others, out_others = list(counts), list(out_counts)
        others[me] = out_others[me] = 0
        request = self.comm.Ialltoallv(
            [_bytes(mine), _scaled(others, mine.itemsize), _scaled(given[:-1].tolist(), mine.itemsize), MPI.BYTE],
            [_bytes(out), _scaled(out_others, out.itemsize), _scaled(taken[:-1].tolist(), out.itemsize), MPI.BYTE],
        )
        out.reshape(-1)[taken[me] : taken[me + 1]] = mine.reshape(-1)[given[me] : given[me + 1]]
        self.watch.request(request, mine.nbytes + out.nbytes)

    def meet(self, nbytes: int) -> None:
        """Wait for all ranks, with pauses, if what follows moves as much as `nbytes`, which all give alike."""
        if nbytes >= LARGE_BYTES:
            self.barrier()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.watch.request(self.comm.Ibarrier())

    def exchange(self, sends: list[tuple[Move, Array]], receives: list[tuple[Move, Array]]) -> None:
        """Carry out `moves`; a move's source and target are ranks of this world, its array the rows that go."""
        requests = [self.comm.Irecv([_bytes(array), MPI.BYTE], source=m.source, tag=MOVE_TAG) for m, array in receives]
        requests += [self.comm.Isend([_bytes(array), MPI.BYTE], dest=m.target, tag=MOVE_TAG) for m, array in sends]
        self.watch.requests(requests, sum(array.nbytes for _, array in (*receives, *sends)))

    # --- the next generation ------------------------------------------------------------------------------------------

    def merge(self, party: Party | None, newcomers: Sequence[Member]) -> World:
        """Take the newcomers in; they come last. Collective with `Door.enter` on their side; `party` on rank 0 alone."""
        members = (*self.generation.members, *newcomers)
        peer, root = (party.group, 1) if party is not None else (MPI.COMM_SELF, 0)

        def merged() -> MPI.Intracomm:
            try:
                inter = self.comm.Create_intercomm(0, peer, root, BRIDGE_TAG)
                comm = inter.Merge(high=False)
                inter.Free()
            except MPI.Exception:
                if vendor().shrinks:
                    self.comm.Revoke()  # only this rank is told of a newcomer's loss; this brings the others out
                raise
            return comm

        comm = together(self.watch, members, merged)
        return World(comm, Generation(self.generation.number, members), self.watch)

    def split(self, leavers: Sequence[int]) -> World | None:
        """Part from the ranks `leavers`; they get None. Collective; both worlds stay open."""
        self.barrier()  # ranks that come early wait here, where they don't spin and can leave
        leaves = self.rank in leavers
        kept = together(
            self.watch, self.generation.members, lambda: self.comm.Split(MPI.UNDEFINED if leaves else 0, self.rank)
        )
        if leaves:
            return None
        members = tuple(m for r, m in enumerate(self.generation.members) if r not in leavers)
        return World(MPI.Intracomm(kept), Generation(self.generation.number, members), self.watch)

    def rebuild(
        self, survivors: Sequence[int], generation: Generation, tag: int, sent: Callable[[], bool] = lambda: True
    ) -> World:
        """Return the world of the ranks `survivors`, as `generation`. Collective over them; this one stays as it is.

        `sent` is called when this rank has sent a word to the others, and tells whether one of them has.
        """

        def rebuilt() -> MPI.Comm:
            if vendor().shrinks:
                if not self.comm.Is_revoked():
                    self.comm.Revoke()
                return self.comm.Shrink()
            # Not freed are the old communicators: some of their messages will never come.
            return self.comm.Create_group(self.comm.group.Incl(survivors), tag)

        if not vendor().shrinks:
            self._greet(survivors, tag, sent)
        comm = together(self.watch, generation.members, rebuilt)
        world = World(MPI.Intracomm(comm), generation, self.watch)
        if world.size != len(survivors):
            raise Lost
        return world

    def _greet(self, survivors: Sequence[int], tag: int, sent: Callable[[], bool]) -> None:
        """Exchange a word with each of the other `survivors` of loss number `tag`, and see that it came.

        So they are connected before the call that brings them together, which can't be left. And one may be deaf: all write
        into one queue in its memory, and if one is killed while it writes, nothing behind that can be read any more. A deaf
        rank ends itself, and the others go on without it.

        Raises
        ------
        LeftOut
            If this rank is deaf.
        """
        others = [rank for rank in survivors if rank != self.rank]
        words = np.full(len(others) + 1, tag, np.int64)  # one to give, the others to take
        received = [self.comm.Irecv(words[i : i + 1], rank, GREETING_TAG) for i, rank in enumerate(others, 1)]
        requests = [*received, *(self.comm.Isend(words[:1], rank, GREETING_TAG) for rank in others)]
        sent()
        deaf = Deaf(sent)

        def look() -> None:
            if deaf(heard=any(request.Test() for request in received)):
                raise LeftOut(f"it heard nothing of what others sent it within {DEAF_S:.0f} s after a loss")

        self.watch.requests(requests, look=look)

    def close_user(self) -> None:
        """Free the user's communicator."""
        if self._user is not None:
            self._user.Free()
            self._user = self._marked = None

    def close(self) -> None:
        """Free the communicators. Local in effect, and all members do it."""
        self.close_user()
        if self.comm != MPI.COMM_NULL:
            self.comm.Free()


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def _scaled(counts: Sequence[int], itemsize: int) -> list[int]:
    return [int(count) * itemsize for count in counts]
