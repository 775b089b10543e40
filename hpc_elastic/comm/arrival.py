"""How newcomers arrive: the leader starts them and gathers them into a party while the members step on.

A newcomer first warms up as a plain process, under its guard, without MPI: nobody waits for it, and its death costs
nothing. When it is ready, `MPI_Comm_spawn` starts `handover.py`, one process in a world of its own, which hands the
launcher's gifts over to the newcomer, so that the newcomer becomes that process for MPI; or it comes with a launcher of its
own (`bridge`). The leader connects over COMM_SELF, from a thread. What joins the party to the members is one
`MPI_Intercomm_create` at a step boundary, however many they are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mpi4py import MPI

from .. import faults
from ..errors import JobError, LaunchError
from ..limits import AT_LIMIT
from ..rundir import RunDirectory
from .bridge import Bridge
from .liveness import BEATS_EVERY_S, Beats
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
    order_file,
    report_file,
)
from .starting import Guarded, start
from .waiting import forsake, send

LOOK_S = 0.25
LONGEST_INIT_S = 12.0  # from the handover until MPI_Init has returned
LONGEST_BRINGING_S = 60.0
GUARDS_WORD_S = 1.0  # how long a guard may take to say that its newcomer has ended
STANDING_IN_S = 1.0  # how long somebody may take to stand in for a newcomer that is gone


@dataclass
class Arrival:
    """One newcomer under way, seen from the leader; one with a `tether` is a parked rank that is woken."""

    options: Options
    tether: tuple[MPI.Intracomm, int] | None = field(default=None, repr=False)
    guard: Guarded | None = None
    report: Report | None = None
    line: MPI.Intercomm | None = None
    error: str = ""
    spawn_s: float = 0.0

    def problem(self, run: RunDirectory) -> str:
        """Return why it can't come, or an empty string."""
        if self.report is None:
            self.report = run.get(report_file(run, self.options.member), Report)
        if self.report is not None and self.report.error:
            return self.report.error
        if not self.error and self.guard is not None and self.guard.poll() is not None:
            end = run.end_of(self.options.member)
            how = end.how() if end is not None else "ended"
            words = end.last_words.strip().splitlines()[-1:] if end is not None else []
            said = f": {words[0].removeprefix('hpc_elastic: ')}" if words else ""
            self.error = f"newcomer {self.options.member} {how} before it had joined{said}"
        return self.error

    def end(self) -> None:
        """End it, wherever it is: it is no part of the job."""
        with contextlib.suppress(ProcessLookupError):
            if self.report is not None and self.guard is not None and self.guard.poll() is None:
                self.guard.kill(self.report.member)  # it may sit in MPI_Init, and heed nothing else
        if self.guard is not None:
            self.guard.terminate()


class Arrivals:
    """All newcomers of one resize, seen from the leader. Nothing here blocks the leader's steps.

    Parameters
    ----------
    run : RunDirectory
        The run.
    bridge : Bridge
        How to connect with a newcomer.
    beats : Beats
        Which newcomers have stalled.
    clock : callable
        Seconds.
    """

    def __init__(self, run: RunDirectory, bridge: Bridge, beats: Beats, clock: Callable[[], float]) -> None:
        self.all: list[Arrival] = []
        self._run = run
        self._bridge = bridge
        self._clock = clock
        self._party: Party | None = None
        self._pairs: list[MPI.Intracomm] = []
        self._bringing: threading.Thread | None = None
        self._brought_s = 0.0
        self._beats = beats
        self._next_beats = 0.0
        self._error = ""
        self._called_off = threading.Event()
        self._gathering = False

    def add(self, arrival: Arrival) -> None:
        """Bring one more: start it, or wake it."""
        self.all.append(arrival)
        report_file(self._run, arrival.options.member).unlink(missing_ok=True)
        if arrival.tether is None:
            try:
                faults.at("start")
                arrival.guard = start(self._run, arrival.options)
            except (LaunchError, OSError) as problem:
                arrival.error = str(problem)
        else:
            tether, rank = arrival.tether
            send(tether, rank, WAKE_TAG, arrival.options)
            arrival.line = MPI.COMM_SELF.Create_intercomm(0, tether, rank, WAKE_TAG)

    # --- while they are under way -------------------------------------------------------------------------------------

    def failing(self) -> list[tuple[Arrival, str]]:
        """Return those that can't come, and why."""
        if self._clock() >= self._next_beats:
            self._next_beats = self._clock() + BEATS_EVERY_S
            for arrival in self.all:
                if not arrival.error and self._beats.stalled(arrival.options.member):
                    arrival.error = f"newcomer {arrival.options.member} gave no sign of life for too long"
        found = [(arrival, arrival.problem(self._run)) for arrival in self.all]
        return [(arrival, problem) for arrival, problem in found if problem]

    def problem(self) -> str:
        """Return why the party as a whole can't come, or an empty string."""
        if self._bringing is None:
            return self._error
        if (failing := self.failing()) or self._error:
            return self._error or failing[0][1]
        if self._party is None and self._clock() - self._brought_s > LONGEST_BRINGING_S:
            return f"the newcomers could not be connected within {LONGEST_BRINGING_S:.0f} s"
        return ""

    def drop(self, arrival: Arrival) -> bool:
        """Go on without one that can't come; False if it is too late for that, since they are being connected."""
        if self._bringing is not None:
            return False
        arrival.end()
        self.all.remove(arrival)
        return True

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
            with contextlib.suppress(MPI.Exception):  # it may be gone, which is noticed elsewhere
                send(arrival.line, THERE, TO_NEWCOMER, order)
        else:
            self._run.put(order_file(self._run, arrival.options.member), order)

    # --- connecting them ----------------------------------------------------------------------------------------------

    def bring(self) -> None:
        """Begin to connect those that are ready, and to form the party."""
        if self._bringing is None:
            self._brought_s = self._clock()
            thread = threading.Thread(target=self._bring, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self._error = f"the newcomers could not be connected: {AT_LIMIT}"
            else:
                self._bringing = thread

    def there(self) -> bool:
        """Tell whether the party stands together."""
        return self._party is not None

    def _bring(self) -> None:
        for arrival in self.all:
            if arrival.line is None and not self._called_off.is_set() and not any(other.error for other in self.all):
                self._connect(arrival)
        if self._called_off.is_set() or any(arrival.error for arrival in self.all):
            self._send_home()
            return
        self._gathering = True
        try:
            self._gather([arrival.line for arrival in self.all if arrival.line is not None])
        except (MPI.Exception, JobError) as error:
            self._error = f"the newcomers could not be brought together: {error}"

    def _connect(self, arrival: Arrival) -> None:
        begun = self._clock()
        connected = threading.Event()
        failed = f"newcomer {arrival.options.member} could not be connected"
        try:
            threading.Thread(target=self._limit, args=(arrival, connected), daemon=True).start()
        except RuntimeError:
            arrival.error = f"{failed}: {AT_LIMIT}"
            return
        try:
            faults.at("spawn")
            arrival.line = self._bridge.connect(self._run, arrival.options.member)
            arrival.spawn_s = self._clock() - begun
        except MPI.Exception as error:
            arrival.error = self._own_end(arrival) or f"{failed}: {error}"
        except (OSError, JobError) as error:
            arrival.error = f"{failed}: {error}"
        finally:
            connected.set()

    def _own_end(self, arrival: Arrival) -> str:
        """Return why a newcomer ended whose call has failed, or nothing if it is there.

        The call may have failed because it died, and its guard has still to say so. The leader steps on meanwhile.
        """
        until = self._clock() + GUARDS_WORD_S
        while not (problem := arrival.problem(self._run)) and self._clock() < until:
            if self._called_off.wait(GUARDS_WORD_S / 50):
                break
        return problem

    def _limit(self, arrival: Arrival, connected: threading.Event) -> None:
        """End a newcomer that does not come out of MPI_Init: this rank is kept in its call until somebody stands in for it.

        Not by the main thread, which may wait for MPI's lock meanwhile.
        """
        since, gone_since, given_up = self._clock(), None, False
        while not connected.wait(LOOK_S):
            gone = arrival.guard is not None and arrival.guard.poll() is not None
            gone_since = (gone_since or self._clock()) if gone else None
            if gone_since is not None and not given_up and self._clock() - gone_since > STANDING_IN_S:
                with contextlib.suppress(OSError):  # there may be room for another process at the next look
                    given_up = self._bridge.give_up(self._run, arrival.options.member)
            if not gone and (self._beats.stalled(arrival.options.member) or self._clock() - since > LONGEST_INIT_S):
                arrival.end()

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
            self._order(arrival, Call(order="enter"))
        return self._party

    # --- sending them away --------------------------------------------------------------------------------------------

    def dismiss(self, patience_s: float = 0.0) -> None:
        """Send all away again, without waiting for them; but for `patience_s` seconds for a call of MPI's under way."""
        self._called_off.set()
        if self._bringing is not None:
            self._bringing.join(patience_s)
        if self._bringing is not None and self._bringing.is_alive():
            forsake(self._bringing)
            if self._gathering:
                self.terminate()  # they may sit in calls that nobody will join
        elif self._bringing is None or self._gathering:
            self._send_home()

    def _send_home(self) -> None:
        for arrival in self.all:
            if arrival.line is not None:
                self._order(arrival, Call(order="go"))
            else:
                arrival.end()
        self.close()

    def terminate(self) -> None:
        """End all, wherever they are."""
        for arrival in self.all:
            arrival.end()

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
