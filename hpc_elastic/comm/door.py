"""The newcomer's side of an arrival: it reports to the leader, waits to be called, and enters."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec
from mpi4py import MPI

from .. import faults
from ..config import STDERR_VARIABLE
from ..errors import MembershipError
from ..model import Member
from ..rundir import RunDirectory
from .collectives import Collectives
from .messages import (
    BRIDGE_TAG,
    CHAIN_TAG,
    LEADER,
    THERE,
    TO_NEWCOMER,
    WAKE_TAG,
    Call,
    Options,
    Party,
    Report,
    extend,
    order_file,
    port_file,
    report_file,
)
from .starting import without_session
from .waiting import Watch, limited, take, take_any
from .world import together

LONGEST_INIT_S = 10
LARGEST = 1 << 18  # bytes of a handover at most


def accept_handover(door: int) -> None:
    """Become, for MPI, the process that the launcher started: take its variables and its session, and initialise MPI."""
    with socket.socket(fileno=door) as guard:
        data, ancillary, _, _ = guard.recvmsg(LARGEST, 1024)
        if not data:
            raise MembershipError("the guard is gone")
        for item in data.split(b"\0"):
            name, value = os.fsdecode(item).split("=", 1)
            os.environ[name] = value
        (rights,) = [rights for _, _, rights in ancillary]
        stdout, stderr, *session = [int.from_bytes(rights[at : at + 4], sys.byteorder) for at in range(0, len(rights), 4)]
        sys.stdout.flush()
        os.dup2(stdout, 1)  # what it had so far was the leader's
        os.close(stdout)
        os.close(stderr)  # for the guard, which stderr goes through
        if session:
            os.environ["PMI_FD"] = str(session[0])
        with limited(LONGEST_INIT_S):
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
        guard.send(b"i")  # from now on nobody has to stand in for this process if it dies


def start_launcher(command: list[str]) -> None:
    """Start the launcher that makes this process, by a handover, a rank in a world of its own."""
    stderr = int(os.environ.get(STDERR_VARIABLE, "2"))  # not through this rank's guard, which goes with it
    # A session of its own: what ends this rank's process group leaves it alone.
    subprocess.Popen(command, env=without_session(), stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


class Door:
    """The newcomer's side: it reports to the leader, waits to be called, and enters.

    Parameters
    ----------
    run : RunDirectory
        The run.
    member : int
        The newcomer's number.
    watch : Watch
        How to wait.
    door : int
        Descriptor where the guard hands the launcher's gifts over; -1 for a parked rank, which has them.
    line : mpi4py.MPI.Intercomm, optional
        The connection to the leader, for a parked rank.
    leader : tuple of Member
        The leader that called.
    launcher : list of str, optional
        Command of the launcher of its own, to be started when it is called; None or nothing if the leader's has it.
    """

    def __init__(
        self,
        run: RunDirectory,
        member: int,
        watch: Watch,
        door: int = -1,
        line: MPI.Intercomm | None = None,
        leader: tuple[Member, ...] = (),
        launcher: list[str] | None = None,
    ) -> None:
        self._run = run
        self._member = member
        self._watch = watch
        self._door = door
        self._line = line
        self._leader = leader
        self._launcher = launcher
        self._pair: MPI.Intracomm | None = None
        self._group: MPI.Intracomm | None = None
        self._others: MPI.Intracomm | None = None
        self._closed = False

    @classmethod
    def parked(
        cls, tether: MPI.Intracomm, run: RunDirectory, watch: Watch, doze: Callable[[], None]
    ) -> tuple[Door, Options]:
        """Sleep until the leader wakes this process; `doze` is called between looks."""
        while True:
            data, rank = take_any(tether, WAKE_TAG)
            if data is not None:
                options = msgspec.msgpack.decode(data, type=Options)
                line = MPI.COMM_SELF.Create_intercomm(0, tether, rank, WAKE_TAG)
                return cls(run, options.member, watch, line=line, leader=(options.leader,)), options
            doze()

    def use(self, watch: Watch) -> None:
        """Wait like that from now on."""
        self._watch = watch

    @property
    def leader(self) -> tuple[Member, ...]:
        """The leader that called this process; without it nobody will call it in."""
        return self._leader

    def report(self, report: Report) -> None:
        """Tell the leader."""
        self._run.put(report_file(self._run, self._member), report)

    def called(self) -> Call:
        """Wait for the leader's next call. After ``gather`` the party has been formed."""
        if self._line is None:
            order = self._connect()
            if order is not None:
                return order
        call = msgspec.msgpack.decode(self._message(), type=Call)
        if call.order == "gather":
            self._gather(call.index, call.total)
        return call

    def _connect(self) -> Call | None:
        """Wait for the handover and connect to the leader; return an order that came instead."""
        found: list[Call] = []
        path = order_file(self._run, self._member)

        def come() -> bool:
            order = self._run.get(path, Call)
            if order is not None:
                path.unlink()
                found.append(order)
            elif (status := self._run.status()) is not None and status.state in ("ended", "stopped"):
                found.append(Call(order="go"))
            elif self._launcher and port_file(self._run, self._member).exists():
                start_launcher(self._launcher)
                self._launcher = None
            return bool(found) or bool(select.select([self._door], [], [], 0)[0])

        self._watch.until(come)
        if found:
            return found[0]
        faults.at("init")
        with self._watch.blocking(self._leader):
            accept_handover(self._door)
        self._line = MPI.Comm.Get_parent()
        if self._line == MPI.COMM_NULL:
            # It has a launcher of its own: it calls the leader, instead of being its launcher's child.
            port = port_file(self._run, self._member).read_text()
            self._line = together(self._watch, self._leader, lambda: MPI.COMM_SELF.Connect(port))
        return None

    def _message(self) -> bytes:
        found: list[bytes] = []
        assert self._line is not None
        line = self._line

        def come() -> bool:
            data = take(line, THERE, TO_NEWCOMER)
            if data is not None:
                found.append(data)
            return bool(found)

        self._watch.until(come)
        return found[0]

    def _gather(self, index: int, total: int) -> None:
        faults.at("gather")
        together(self._watch, self._leader, lambda: self._chain(index, total))

    def _chain(self, index: int, total: int) -> None:
        assert self._line is not None
        self._pair = self._line.Merge(high=True)
        if index == 0:
            group = self._pair.Dup()
        else:
            inter = MPI.COMM_SELF.Create_intercomm(0, self._pair, LEADER, CHAIN_TAG)
            group = inter.Merge(high=True)
            inter.Free()
        for _ in range(index + 1, total):
            group = extend(group, MPI.COMM_SELF, 0)
        self._group = group
        self._others = MPI.Intracomm(group.Split(0, group.rank))

    def enter(self) -> tuple[MPI.Intracomm, Party]:
        """Be merged with the members. Collective with `World.merge` on their side."""
        if self._group is None or self._others is None:
            raise MembershipError("entered before the party was gathered")
        others, group = self._others, self._group

        def merged() -> MPI.Intracomm:
            inter = others.Create_intercomm(0, group, LEADER, BRIDGE_TAG)
            comm = inter.Merge(high=True)
            inter.Free()
            return comm

        comm = together(self._watch, self._leader, merged)
        Collectives(comm, self._watch).barrier()
        return comm, Party(group)

    def close(self) -> None:
        """Free the communicators."""
        if not self._closed:
            self._closed = True
            for comm in (self._group, self._others, self._pair, self._line):
                if comm is not None:
                    comm.Free()
