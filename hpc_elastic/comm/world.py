"""The world of one generation: its communicators, and how it becomes the next one."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import mpi4py
import msgspec
import numpy as np
from mpi4py import MPI

from ..errors import ArrayError
from ..model import Generation, Member
from .board import Board
from .collectives import Array, Collectives
from .liveness import DEAF_S, Deaf
from .messages import BRIDGE_TAG, GREETING_TAG, Party
from .user import UserComm
from .vendor import Vendor, own_shared_memory, under_launcher, unmapped, vendor_of
from .waiting import LeftOut, Lost, Watch, end_in_time, forsaken, limited

T = TypeVar("T")
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


def at_exit() -> None:
    """End MPI at the interpreter's end; or the process, where MPI can't be ended and mpi4py would do so all the same.

    That it does where the script has imported MPI before `he.run` could tell it not to. The code is then 1 after an
    exception, else 0: one that the script has given to ``sys.exit`` Python has forgotten by now.
    """
    finalize()
    if forsaken() and mpi4py.rc.finalize is not False:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if hasattr(sys, "last_value") else 0)


class Belonging(Protocol):
    """What belongs to one generation, and ends with it."""

    def close(self) -> None:
        """End it, without the others."""
        ...


class World(Collectives):
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
        super().__init__(comm, watch)
        self.generation = generation
        self._user: MPI.Intracomm | None = None
        self._marked: UserComm | None = None
        self._board: Board | None = None
        self._belongings: dict[str, Belonging] = {}

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

    @property
    def board(self) -> Board:
        """Where the ranks of a host meet in memory. Collective when it is first asked for."""
        if self._board is None:
            self._board = Board(self, self.generation.members)
        return self._board

    def keep(self, name: str, make: Callable[[], Belonging]) -> Belonging:
        """Return what this generation has under `name`: made when it is first asked for, closed when the generation ends."""
        if name not in self._belongings:
            self._belongings[name] = make()
        return self._belongings[name]

    def barrier(self, among: Sequence[int] | None = None) -> None:
        """Wait for all ranks, or for those `among` them."""
        if among is None and self._board is not None and self._board.whole:
            self._board.meet()
        else:
            super().barrier(among)

    def word(self, number: int) -> int:
        """Return the `number` of rank 0. Collective, though rank 0 may be ahead of the others."""
        if self.size == 1:
            return number
        if self._board is not None and self._board.whole:
            return self._board.spread(number)
        heard = np.array([number])
        self.fill(heard)
        return int(heard[0])

    def same(self, number: int) -> bool:
        """Tell whether all ranks give the same `number`, of up to 63 bits. Collective."""
        if self.size == 1:
            return True
        board = self.board
        if not board.whole:
            return len(set(self.gather_all(number.to_bytes(8, "little")))) == 1
        board.tell([number])
        board.meet()
        return all(told == [number] for told in board.told())

    def library_sum(self, array: Array) -> None:
        """Add up the ranks' flat `array` in place, as MPI does. Collective; a rank that is in it when another is lost ends.

        Raises
        ------
        ArrayError
            If MPI has no sum of this dtype.
        """
        try:
            datatype = MPI.Datatype.fromcode(array.dtype.char)
        except ValueError:
            datatype = MPI.DATATYPE_NULL
        if datatype == MPI.DATATYPE_NULL or array.dtype.kind == "b" or not array.dtype.isnative:
            raise ArrayError(f"MPI has no sum of {array.dtype}: leave exact=True")
        self.user.Allreduce(MPI.IN_PLACE, [array, datatype])

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

        world = World(together(self.watch, members, merged), Generation(self.generation.number, members), self.watch)
        world.barrier()  # who dies from here on can't take along ranks that are still in the call: Open MPI crashes there
        return world

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

        self.close_belongings()
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

    def close_belongings(self) -> None:
        """Close what was kept. Local."""
        while self._belongings:
            self._belongings.popitem()[1].close()

    def close_user(self) -> None:
        """Free the user's communicator, and close what was kept."""
        self.close_belongings()
        if self._user is not None:
            self._user.Free()
            self._user = self._marked = None

    def close(self) -> None:
        """Free the communicators. Local in effect, and all members do it."""
        self.close_user()
        self._board = None
        if self.comm != MPI.COMM_NULL:
            self.comm.Free()
