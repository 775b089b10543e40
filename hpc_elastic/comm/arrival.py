"""How newcomers arrive: the leader starts them and gathers them into a party while the members step on.

A newcomer first warms up as a plain process, under its guard, without MPI: nobody waits for it, and its death costs
nothing. When it is ready, `MPI_Comm_spawn` starts `handover.py`, one process in a world of its own, which hands the
launcher's gifts over to the newcomer, so that the newcomer becomes that process for MPI. The leader spawns over COMM_SELF
from a thread. What joins the party to the members is one `MPI_Intercomm_create` at a step boundary, however many they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mpi4py import MPI

from ..rundir import RunDirectory
from .messages import (
    NEWCOMER,
    THERE,
    TO_NEWCOMER,
    WAKE_TAG,
    Call,
    Options,
    Party,
    Report,
    extend,
    options_file,
    order_file,
    report_file,
)
from .vendor import Vendor
from .waiting import Watch, send

PACKAGE = Path(__file__).parent.parent
# What a launcher sets for the rank that starts a newcomer, and that is not the newcomer's.
LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE", "PRTE_LAUNCHED", "HYDI_", "MPI_LOCAL")


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
        # -I -S: neither site-packages nor the environment's Python settings, so that the guard is there at once.
        guard = [sys.executable, "-I", "-S", str(PACKAGE / "guard.py"), "--warm", self._socket(options)]
        worker = [sys.executable, "-m", "hpc_elastic.worker", options.run_dir, str(options.member)]
        return subprocess.Popen(
            [*guard, options.run_dir, str(options.member), *worker], env=environ, stdin=subprocess.DEVNULL
        )

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
            if self._bringing is None and arrival.report is not None and arrival.report.loop < loop:
                report_file(self._run, arrival.options.member).unlink()
                self._order(arrival, Call(order="skip"))
                arrival.report = None

    def passed(self, loop: int) -> bool:
        """Tell whether they are being connected for a loop before number `loop`."""
        late = (arrival.report is not None and arrival.report.loop < loop for arrival in self.all)
        return self._bringing is not None and any(late)

    def _order(self, arrival: Arrival, order: Call) -> None:
        """Tell a newcomer something, by a file as long as it is not connected."""
        if arrival.line is not None:
            send(arrival.line, THERE, TO_NEWCOMER, order)
        else:
            self._run.put(order_file(self._run, arrival.options.member), order)

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
                command = ["-I", "-S", str(PACKAGE / "handover.py"), self._socket(arrival.options)]
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
            group = extend(group, pair, NEWCOMER)
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
            self._order(arrival, Call(order="go"))
        self.terminate()
        self.close()

    def terminate(self) -> None:
        """End those that are not connected."""
        for arrival in self.all:
            if arrival.line is None and arrival.guard is not None:
                arrival.guard.terminate()

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
