"""How newcomers arrive: the leader starts them and gathers them into a party while the members step on.

A newcomer first warms up as a plain process, under its guard, without MPI: nobody waits for it, and its death costs
nothing. When it is ready, `MPI_Comm_spawn` starts `handover.py`, one process in a world of its own, which hands the
launcher's gifts over to the newcomer, so that the newcomer becomes that process for MPI. The leader spawns over COMM_SELF
from a thread. What joins the party to the members is one `MPI_Intercomm_create` at a step boundary, however many they are.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


import msgspec
from mpi4py import MPI

from ..errors import MembershipError
from ..model import Member
from ..rundir import RunDirectory
from .vendor import Vendor
from .waiting import Watch, send, take, take_any

TO_NEWCOMER, WAKE_TAG, CHAIN_TAG, BRIDGE_TAG = 11, 12, 13, 14
THERE = 0  # rank of the other side, in the intercommunicator between the leader and a newcomer
LEADER, NEWCOMER = 0, 1  # ranks in the pair that the two form when the party is gathered
PACKAGE = Path(__file__).parent.parent
LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE", "PRTE_LAUNCHED", "HYDI_", "MPI_LOCAL")
LARGEST = 1 << 18  # bytes of a handover at most


def options_file(run: RunDirectory, member: int) -> Path:
    """Return where the leader writes what newcomer `member` must know."""
    return run.newcomers / f"{member}.json"


def report_file(run: RunDirectory, member: int) -> Path:
    """Return where newcomer `member` writes its report."""
    return run.newcomers / f"{member}.report.json"


def order_file(run: RunDirectory, member: int) -> Path:
    """Return where the leader tells newcomer `member` to go on to the next loop."""
    return run.newcomers / f"{member}.order.json"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer must know before it runs the user's script."""

    member: int
    slot: int
    run_dir: str
    settings: dict[str, object]
    argv: list[str]
    module: str
    path: list[str]
    directory: str
    started: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer says: it is there, it is warm at loop number `loop`, or `error` tells why it can't come."""

    member: Member
    loop: int = 0
    names: list[str] = []
    stages: dict[str, float] = {}
    peak_bytes: int = 0
    error: str = ""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader says to a newcomer: ``gather`` with the others of its party, ``enter``, ``skip`` this loop, ``go``."""

    order: str
    index: int = 0
    total: int = 0


@dataclass
class Party:
    """Newcomers that are together with the leader: rank 0 of `group` is the leader, the newcomers follow in order."""

    group: MPI.Intracomm


@dataclass
class Arrival:
    """One newcomer under way, seen from the leader; one with a `tether` is a parked rank that is woken."""

    options: Options
    tether: tuple[MPI.Intracomm, int] | None = field(default=None, repr=False)
    guard: subprocess.Popen[bytes] | None = None
    report: Report | None = None
    line: MPI.Intercomm | None = None
    error: str = ""
    spawn_s: float = 0.0


class Arrivals:
    """All newcomers of one resize, seen from the leader. Nothing here blocks the leader's steps.

    Parameters
    ----------
    arrivals : list of Arrival
        Whom to bring.
    run : RunDirectory
        The run.
    vendor : Vendor
        The MPI loaded.
    clock : callable
        Seconds.
    """

    def __init__(self, arrivals: list[Arrival], run: RunDirectory, vendor: Vendor, clock: Callable[[], float]) -> None:
        self.all = arrivals
        self._run = run
        self._vendor = vendor
        self._clock = clock
        self._party: Party | None = None
        self._pairs: list[MPI.Intracomm] = []
        self._bringing: threading.Thread | None = None
        self._error = ""
        for arrival in arrivals:
            report_file(run, arrival.options.member).unlink(missing_ok=True)
            if arrival.tether is None:
                arrival.guard = self._start(arrival.options)
            else:
                tether, rank = arrival.tether
                send(tether, rank, WAKE_TAG, arrival.options)
                arrival.line = MPI.COMM_SELF.Create_intercomm(0, tether, rank, WAKE_TAG)

    def _start(self, options: Options) -> subprocess.Popen[bytes]:
        """Start a newcomer under its guard. It gets nothing of this rank's own session with the launcher."""
        self._run.put(options_file(self._run, options.member), options)
        environ = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        # -S -E: neither site-packages nor the environment's Python settings, so that the guard is there at once.
        guard = [sys.executable, "-S", "-E", str(PACKAGE / "guard.py"), "--warm", self._socket(options)]
        worker = [sys.executable, "-m", "hpc_elastic.worker", options.run_dir, str(options.member)]
        return subprocess.Popen([*guard, options.run_dir, str(options.member), *worker], env=environ, stdin=subprocess.DEVNULL)

    def _socket(self, options: Options) -> str:
        return str(self._run.newcomers / f"{options.member}.sock")

    def look(self) -> str:
        """Take the newcomers' reports; return why the party can't come, or an empty string."""
        for arrival in self.all:
            if arrival.report is None:
                arrival.report = self._run.get(report_file(self._run, arrival.options.member), Report)
            if arrival.report is not None and arrival.report.error:
                return arrival.report.error
            if arrival.error:
                return arrival.error
            if arrival.guard is not None and (code := arrival.guard.poll()) is not None:
                return f"newcomer {arrival.options.member} ended with code {code} before it had joined"
        return self._error

    def warm(self) -> bool:
        """Tell whether all have reported themselves ready."""
        return all(arrival.report is not None for arrival in self.all)

    def skip(self, loop: int) -> None:
        """Send those that wait at an earlier loop than number `loop` on to the next one."""
        for arrival in self.all:
            if self._bringing is None and arrival.report is not None and 0 < arrival.report.loop < loop:
                report_file(self._run, arrival.options.member).unlink()
                self._run.put(order_file(self._run, arrival.options.member), Call(order="skip", index=arrival.report.loop))
                arrival.report = None

    def bring(self) -> None:
        """Begin to connect those that are ready, and to form the party."""
        if self._bringing is None:
            self._bringing = threading.Thread(target=self._bring, daemon=True)
            self._bringing.start()

    def there(self) -> bool:
        """Tell whether the party stands together."""
        return self._party is not None

    def _bring(self) -> None:
        fresh = [arrival for arrival in self.all if arrival.line is None]
        lots = [[arrival] for arrival in fresh] if self._vendor.spawns_at_once else [fresh]
        threads = [threading.Thread(target=self._spawn, args=(lot,), daemon=True) for lot in lots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not any(arrival.error for arrival in self.all):
            try:
                self._gather([arrival.line for arrival in self.all if arrival.line is not None])
            except MPI.Exception as error:
                self._error = f"the newcomers could not be brought together: {error}"

    def _spawn(self, lot: list[Arrival]) -> None:
        for arrival in lot:
            begun = self._clock()
            try:
                # Nothing else collective here: MPICH mixes up the messages of two merges at a time.
                command = ["-S", "-E", str(PACKAGE / "handover.py"), self._socket(arrival.options)]
                arrival.line = MPI.COMM_SELF.Spawn(sys.executable, command, maxprocs=1)
                arrival.spawn_s = self._clock() - begun
            except MPI.Exception as error:
                arrival.error = f"spawn failed: {error}"

    def _gather(self, lines: list[MPI.Intercomm]) -> None:
        for index, line in enumerate(lines):
            send(line, THERE, TO_NEWCOMER, Call(order="gather", index=index, total=len(lines)))
        self._pairs = [line.Merge(high=False) for line in lines]
        group = self._pairs[0].Dup()
        for pair in self._pairs[1:]:
            group = _extend(group, pair, NEWCOMER)
        group.Split(MPI.UNDEFINED, 0)
        self._party = Party(group)

    def enter(self) -> Party:
        """Send the party to the members' door; `World.merge` follows."""
        assert self._party is not None
        for arrival in self.all:
            assert arrival.line is not None
            send(arrival.line, THERE, TO_NEWCOMER, Call(order="enter"))
        return self._party

    def dismiss(self, watch: Watch) -> None:
        """Send all away again. Those that are not connected are simply ended."""
        if self._bringing is not None:
            watch.until(lambda: self._bringing is None or not self._bringing.is_alive())
        for arrival in self.all:
            if arrival.line is not None:
                send(arrival.line, THERE, TO_NEWCOMER, Call(order="go"))
            elif arrival.guard is not None:
                arrival.guard.terminate()
        self.close()

    def close(self) -> None:
        """Free the communicators."""
        if self._party is not None:
            self._party.group.Free()
            self._party = None
        for pair in self._pairs:
            pair.Free()
        self._pairs.clear()
        for arrival in self.all:
            if arrival.line is not None:
                arrival.line.Free()
                arrival.line = None


def _extend(group: MPI.Intracomm, peer: MPI.Comm, remote: int) -> MPI.Intracomm:
    inter = group.Create_intercomm(0, peer, remote, CHAIN_TAG)
    merged = inter.Merge(high=False)
    inter.Free()
    group.Free()
    return merged


def accept_handover(door: int) -> None:
    """Become, for MPI, the process that the launcher started: take its variables and its session, and initialise MPI."""
    with socket.socket(fileno=door) as guard:
        data, ancillary, _, _ = guard.recvmsg(LARGEST, 1024)
    if not data:
        raise MembershipError("the guard is gone")
    for item in data.split(b"\0"):
        name, value = os.fsdecode(item).split("=", 1)
        os.environ[name] = value
    for _, _, descriptors in ancillary:
        os.environ["PMI_FD"] = str(int.from_bytes(descriptors[:4], sys.byteorder))
    MPI.Init_thread(MPI.THREAD_MULTIPLE)


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
    """

    def __init__(self, run: RunDirectory, member: int, watch: Watch, door: int = -1, line: MPI.Intercomm | None = None) -> None:
        self._run = run
        self._member = member
        self._watch = watch
        self._door = door
        self._line = line
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
                return cls(run, options.member, watch, line=line), options
            doze()

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
            return bool(found) or bool(select.select([self._door], [], [], 0)[0])

        self._watch.until(come)
        if found:
            return found[0]
        accept_handover(self._door)
        self._line = MPI.Comm.Get_parent()
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
        assert self._line is not None
        self._pair = self._line.Merge(high=True)
        if index == 0:
            group = self._pair.Dup()
        else:
            inter = MPI.COMM_SELF.Create_intercomm(0, self._pair, LEADER, CHAIN_TAG)
            group = inter.Merge(high=True)
            inter.Free()
        for _ in range(index + 1, total):
            group = _extend(group, MPI.COMM_SELF, 0)
        self._group = group
        self._others = group.Split(0, group.rank)

    def enter(self) -> tuple[MPI.Intracomm, Party]:
        """Be merged with the members. Collective with `World.merge` on their side."""
        if self._group is None or self._others is None:
            raise MembershipError("entered before the party was gathered")
        inter = self._others.Create_intercomm(0, self._group, LEADER, BRIDGE_TAG)
        merged = inter.Merge(high=True)
        inter.Free()
        return merged, Party(self._group)

    def close(self) -> None:
        """Free the communicators."""
        if not self._closed:
            self._closed = True
            for comm in (self._group, self._others, self._pair, self._line):
                if comm is not None:
                    comm.Free()
