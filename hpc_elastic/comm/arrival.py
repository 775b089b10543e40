"""How newcomers arrive: the leader starts them and gathers them into a party while the members step on.

Each newcomer is its own MPI world (`MPI_Comm_spawn` with one process), so that it can leave singly. The leader spawns over
COMM_SELF from a thread; what joins the party to the members is one `MPI_Intercomm_create` at a step boundary, however many
newcomers there are.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from mpi4py import MPI

from ..errors import MembershipError
from ..model import Member
from .vendor import Vendor
from .waiting import Watch, send, take, take_any

TO_NEWCOMER, TO_LEADER, WAKE_TAG, CHAIN_TAG, BRIDGE_TAG = 11, 12, 13, 14, 15
THERE = 0  # rank of the other side, in the intercommunicator between the leader and a newcomer
LEADER, NEWCOMER = 0, 1  # ranks in the pair that the two form when the party is gathered
GUARD = Path(__file__).parent.parent / "guard.py"


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
    """One newcomer under way, seen from the leader."""

    options: Options
    line: MPI.Intercomm | None = None
    hello: Report | None = None
    report: Report | None = None
    error: str = ""
    spawn_s: float = 0.0
    tether: tuple[MPI.Intracomm, int] | None = field(default=None, repr=False)


class Arrivals:
    """All newcomers of one resize, seen from the leader. Nothing here blocks the leader's steps.

    Parameters
    ----------
    arrivals : list of Arrival
        Whom to bring; one with a `tether` is a parked rank that is woken, the others are spawned.
    vendor : Vendor
        The MPI loaded.
    clock : callable
        Seconds.
    """

    def __init__(self, arrivals: list[Arrival], vendor: Vendor, clock: Callable[[], float]) -> None:
        self.all = arrivals
        self._clock = clock
        self._environment = [f"{key}={os.environ[key]}" for key in vendor.environment if key in os.environ]
        self._party: Party | None = None
        self._pairs: list[MPI.Intracomm] = []
        self._gathering: threading.Thread | None = None
        self._error = ""
        for arrival in arrivals:
            if arrival.tether is not None:
                _wake(arrival)
        fresh = [arrival for arrival in arrivals if arrival.tether is None]
        lots = [[arrival] for arrival in fresh] if vendor.spawns_at_once else [fresh]
        self._threads = [threading.Thread(target=self._spawn, args=(lot,), daemon=True) for lot in lots if lot]
        for thread in self._threads:
            thread.start()

    def _spawn(self, lot: list[Arrival]) -> None:
        for arrival in lot:
            begun = self._clock()
            options = arrival.options
            try:
                # -S -E: neither site-packages nor the environment's Python settings, so that the guard is there at once.
                guard = ["-S", "-E", str(GUARD), options.run_dir, str(options.member), *self._environment]
                worker = [sys.executable, "-m", "hpc_elastic.worker"]
                # Nothing collective here: MPICH mixes up the messages of two merges at a time.
                line = MPI.COMM_SELF.Spawn(sys.executable, [*guard, *worker], maxprocs=1)
                send(line, THERE, TO_NEWCOMER, options)
                arrival.spawn_s = self._clock() - begun
                Watch().until(lambda arrival=arrival, line=line: _greeted(arrival, line))
                arrival.line = line
            except (MPI.Exception, OSError) as error:
                arrival.error = f"spawn failed: {error}"

    def look(self) -> str:
        """Take the newcomers' reports; return why the party can't come, or an empty string."""
        for arrival in self.all:
            if arrival.line is not None and arrival.report is None:
                data = take(arrival.line, THERE, TO_LEADER)
                if data is not None:
                    arrival.report = msgspec.msgpack.decode(data, type=Report)
            error = arrival.error or (arrival.report.error if arrival.report else "")
            if error:
                return error
        return self._error

    def warm(self) -> bool:
        """Tell whether all have reported themselves ready."""
        return all(arrival.report is not None for arrival in self.all)

    def skip(self, loop: int) -> None:
        """Send those that wait at an earlier loop than number `loop` on to the next one."""
        for arrival in self.all:
            if arrival.report is not None and arrival.report.loop < loop:
                assert arrival.line is not None
                send(arrival.line, THERE, TO_NEWCOMER, Call(order="skip"))
                arrival.report = None

    def gather(self) -> None:
        """Begin to form the party."""
        if self._gathering is None:
            self._gathering = threading.Thread(target=self._gather, daemon=True)
            self._gathering.start()

    def gathered(self) -> bool:
        """Tell whether the party stands together."""
        return self._party is not None

    def _gather(self) -> None:
        lines = [arrival.line for arrival in self.all if arrival.line is not None]
        try:
            for index, line in enumerate(lines):
                send(line, THERE, TO_NEWCOMER, Call(order="gather", index=index, total=len(lines)))
            self._pairs = [line.Merge(high=False) for line in lines]
            group = self._pairs[0].Dup()
            for pair in self._pairs[1:]:
                group = _extend(group, pair, NEWCOMER)
            group.Split(MPI.UNDEFINED, 0)
            self._party = Party(group)
        except MPI.Exception as error:
            self._error = f"the newcomers could not be brought together: {error}"

    def enter(self) -> Party:
        """Send the party to the members' door; `World.merge` follows."""
        assert self._party is not None
        for arrival in self.all:
            assert arrival.line is not None
            send(arrival.line, THERE, TO_NEWCOMER, Call(order="enter"))
        return self._party

    def dismiss(self, watch: Watch) -> None:
        """Send all away again; waits until those being spawned can be told."""
        watch.until(lambda: not any(thread.is_alive() for thread in self._threads))
        if self._gathering is not None:
            watch.until(lambda: self._gathering is None or not self._gathering.is_alive())
        for arrival in self.all:
            if arrival.line is not None:
                send(arrival.line, THERE, TO_NEWCOMER, Call(order="go"))
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


def _greeted(arrival: Arrival, line: MPI.Intercomm) -> bool:
    data = take(line, THERE, TO_LEADER)
    if data is not None:
        arrival.hello = msgspec.msgpack.decode(data, type=Report)
    return data is not None


def _wake(arrival: Arrival) -> None:
    assert arrival.tether is not None
    tether, rank = arrival.tether
    send(tether, rank, WAKE_TAG, arrival.options)
    arrival.line = MPI.COMM_SELF.Create_intercomm(0, tether, rank, WAKE_TAG)


def _extend(group: MPI.Intracomm, peer: MPI.Comm, remote: int) -> MPI.Intracomm:
    inter = group.Create_intercomm(0, peer, remote, CHAIN_TAG)
    merged = inter.Merge(high=False)
    inter.Free()
    group.Free()
    return merged


class Door:
    """The newcomer's side: it reports to the leader, waits to be called, and enters."""

    def __init__(self, line: MPI.Intercomm, watch: Watch) -> None:
        self._line = line
        self._watch = watch
        self._pair: MPI.Intracomm | None = None
        self._closed = False
        self._group: MPI.Intracomm | None = None
        self._others: MPI.Intracomm | None = None

    @classmethod
    def spawned(cls) -> Door | None:
        """Return the door of a process that was spawned, or None in any other."""
        parent = MPI.Comm.Get_parent()
        if parent == MPI.COMM_NULL:
            return None
        return cls(parent, Watch())

    @classmethod
    def parked(cls, tether: MPI.Intracomm, watch: Watch, doze: Callable[[], None]) -> tuple[Door, Options]:
        """Sleep until the leader wakes this process; `doze` is called between looks."""
        while True:
            data, rank = take_any(tether, WAKE_TAG)
            if data is not None:
                line = MPI.COMM_SELF.Create_intercomm(0, tether, rank, WAKE_TAG)
                return cls(line, watch), msgspec.msgpack.decode(data, type=Options)
            doze()

    def options(self) -> Options:
        """Receive the options."""
        return msgspec.msgpack.decode(self._message(), type=Options)

    def watch(self, watch: Watch) -> None:
        """From now on wait under `watch`."""
        self._watch = watch

    def _message(self) -> bytes:
        found: list[bytes] = []

        def come() -> bool:
            data = take(self._line, THERE, TO_NEWCOMER)
            if data is not None:
                found.append(data)
            return bool(found)

        self._watch.until(come)
        return found[0]

    def report(self, report: Report) -> None:
        """Tell the leader."""
        send(self._line, THERE, TO_LEADER, report)

    def called(self) -> Call:
        """Wait for the leader's next call. After ``gather`` the party has been formed."""
        call = msgspec.msgpack.decode(self._message(), type=Call)
        if call.order == "gather":
            self._gather(call.index, call.total)
        return call

    def _gather(self, index: int, total: int) -> None:
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
