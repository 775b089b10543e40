"""One rank's vigil over the others: what ends its waits, and what ends the rank itself where it can't wait any more."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from .. import faults
from ..comm.liveness import Liveness
from ..comm.reach import Reach
from ..comm.waiting import LONGEST_CALL_S, Lost
from ..comm.wires import Wires
from ..config import GUARD_VARIABLE
from ..errors import LaunchError, RunDirectoryError
from ..limits import AT_LIMIT
from ..model import Member
from ..processes import alive
from .standstill import LOOK_S as STANDSTILL_S
from .standstill import Standstill
from .stuck import Stuck

if TYPE_CHECKING:
    from pathlib import Path

    from .session import Session

LOOK_S = 0.25
GLANCE_EVERY_S = 0.02  # waits look more often, and each step has one
NO_MEETINGS = -1
DEPARTED_S = 30.0  # how long connections with those who left may break
UNKNOWN_S = 10.0  # how long a reason is looked for why a connection has broken
NOTICE_S = 1.0  # how long a blocking call of MPI's may go on after one who takes part in it has gone


class Vigil:
    """Looks after the processes that this rank works with.

    Attributes
    ----------
    losses : int
        How many losses the job has gone on after; the survivors of the next one meet under this number. `NO_MEETINGS` in
        a process that is no member.
    over : bool
        True once nothing more is to be watched.
    waits : callable
        For how many seconds this rank has waited for others.
    """

    def __init__(self, session: Session, me: Member) -> None:
        self.losses = NO_MEETINGS
        self.over = False
        self.waits: Callable[[], float] = lambda: 0.0
        self.me = me
        self._session = session
        self._losses = session.run.path / "losses"
        self._liveness = Liveness(session.run, session.config.stall_s)
        self._lock = threading.Lock()  # the thread looks as well
        self._blocked: dict[object, tuple[tuple[Member, ...], float, float]] = {}
        self._gone_since: dict[int, float] = {}
        self._lost_since: tuple[int, float] | None = None
        self._stuck_in_mpi = Stuck()
        config = session.config
        self._reach = Reach()
        self._standstill = Standstill(session.run, me, config.stall_s, config.deadline_s + config.stall_s, self._reach)
        self._doubtful: set[str] = set()
        self._wires = Wires()
        self._broken_since = self._next_glance = 0.0
        self._departed: dict[str, float] = {}  # host of a leaver -> until when connections with it may break
        self._members: tuple[Member, ...] = ()
        self._changed = threading.Event()  # hosts that are new are asked at once, while all is well
        self._guard = int(os.environ.pop(GUARD_VARIABLE, "0"))  # as it says: the parent is another one if it has gone by now

    def watch(self, members: Iterable[Member]) -> None:
        """Look after these processes from now on."""
        before, self._members = self._members, tuple(members)
        with self._lock:
            stay = {member.id for member in self._members} | self._liveness.lost()
            self._liveness.watch(self._members)
        # Connections with those lost have broken already; with those who leave they will.
        self._wires.forget(self._wires.broken())
        until = time.monotonic() + DEPARTED_S
        self._departed |= {member.host: until for member in before if member.id not in stay}
        self._changed.set()

    def gone(self, members: Iterable[Member]) -> frozenset[int]:
        """Return the numbers of those that have ended."""
        with self._lock:
            return self._liveness.among(tuple(members))

    def left(self, number: int) -> bool:
        """Tell whether a process that has ended was done with the job."""
        return self._liveness.left(number)

    def meeting(self) -> Path:
        """Return the folder where the survivors of the next loss meet."""
        return self._losses / str(self.losses)

    def greeted(self) -> bool:
        """Say that this process has sent a word to the other survivors of the last loss; tell whether one of them has."""
        folder = self._losses / str(self.losses - 1)
        with contextlib.suppress(OSError):  # without a word from here nobody is taken for deaf
            (folder / f"{self.me.id}.greeted").touch(mode=0o600)
        return len(list(folder.glob("*.greeted"))) > 1

    def broken(self) -> bool:
        """Tell whether a connection with another rank has broken, and it is not known why: nothing must be sent now."""
        hosts = self._wires.broken()
        if not hosts:
            self._broken_since = 0.0
            return False
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        known = {host for host in hosts if now < self._departed.get(host, 0.0)}
        self._wires.forget(hosts if now - self._broken_since > UNKNOWN_S else known)
        self._liveness.hurry()
        return bool(hosts - known)

    def check(self) -> None:
        """Raise what the job failed with, or `Lost` if a process is lost or others have said so."""
        self._session.check()
        self.broken()
        with self._lock:
            lost = self._liveness.lost()
        meeting = f"{self._losses}/{self.losses}"
        if lost or (self.losses != NO_MEETINGS and os.path.exists(meeting)):  # noqa: PTH110  (called at every step)
            faults.at("detect")
            raise Lost(lost)

    def glance(self) -> None:
        """Check as `check` does, but not if that was done a moment ago: for the steps of a job that waits for nobody."""
        now = time.monotonic()
        if now >= self._next_glance:
            self._next_glance = now + GLANCE_EVERY_S
            self.check()

    @contextlib.contextmanager
    def blocking(self, members: Iterable[Member]) -> Iterator[None]:
        """Mark a call of MPI's that can't be left: if one of `members` goes, this process goes as well, soon after."""
        with self._marked(tuple(members), LONGEST_CALL_S):
            yield

    @contextlib.contextmanager
    def users(self, members: Iterable[Member]) -> Iterator[None]:
        """Mark a call of the user's own, which may last as long as it likes."""
        with self._marked(tuple(members), float("inf")):
            yield

    @contextlib.contextmanager
    def _marked(self, members: tuple[Member, ...], limit_s: float) -> Iterator[None]:
        token = object()  # the user may call from several threads
        self._blocked[token] = members, time.monotonic(), limit_s
        try:
            yield
        finally:
            del self._blocked[token]

    def start(self, ends: Callable[[str], None], failed: Callable[[], None]) -> None:
        """Give signs of life from now on. `failed` is called once the job has failed, `ends` with why this rank must end."""
        try:
            threading.Thread(target=self._run, args=(ends, failed), daemon=True).start()
            threading.Thread(target=self._look_at_hosts, args=(ends,), daemon=True).start()
        except RuntimeError as problem:
            raise LaunchError(f"process {self.me.id} on {self.me.host} can't start its threads: {AT_LIMIT}") from problem

    def _run(self, ends: Callable[[str], None], failed: Callable[[], None]) -> None:
        beat = self._session.run.beat_file(self.me.id)
        while True:  # also while the process is ending: until then it is no stalled one
            with contextlib.suppress(OSError):
                beat.touch(mode=0o600)
                os.utime(beat)
            with contextlib.suppress(OSError, RunDirectoryError):  # a file system can have a bad moment
                if not self.over and self._session.run.failed():
                    failed()
                elif not self.over and (reason := self._stuck()) and not self.over:
                    ends(reason)
            time.sleep(LOOK_S)

    def _look_at_hosts(self, ends: Callable[[str], None]) -> None:
        """Look for hosts that are lost, and standstills. In a thread of its own: asking other hosts can take long."""
        while not self.over:
            if others := {member.host for member in self._members} - {self.me.host}:
                self._reach.learn(others)
                self._wires.scan({address: host for address, host in self._reach.hosts.items() if host in others})
            with self._lock:
                silent = self._liveness.silent()
            doubtful = self._reach.cut_off({member.host for member in silent})
            with self._lock:
                self._liveness.give_up(member for member in silent if member.host in doubtful & self._doubtful)
            self._doubtful = doubtful
            members = self._members if self.losses != NO_MEETINGS else ()
            reason = self._standstill.look(members, self.waits() if members else 0.0)
            if reason and not self.over:
                ends(reason)
            self._changed.wait(STANDSTILL_S)
            self._changed.clear()

    def _stuck(self) -> str:
        """Return why this process can't go on: it is in a call of MPI's with one who has gone, or for too long."""
        if self._guard and not alive(self._guard):
            return "its guard is gone, which answers for it to the launcher"
        if (seconds := self._stuck_in_mpi.seconds()) > LONGEST_CALL_S:
            return f"a call of MPI's did not return within {seconds:.0f} s"
        now = time.monotonic()
        for members, since, limit_s in list(self._blocked.values()):
            gone = sorted(number for number in self.gone(members) if not self.left(number))
            if gone and now - max(since, self._gone_since.setdefault(gone[0], now)) > NOTICE_S:
                return f"process {gone[0]} was lost inside a call of MPI's that the others can't leave"
            if now - since > limit_s:
                return f"a call of MPI's that brings ranks together did not end within {now - since:.0f} s"
        return "" if self._blocked else self._bereft()

    def _bereft(self) -> str:
        """Return why this process can't go on: it did not come back to the runtime for long after a member was lost."""
        with self._lock:
            lost = self._liveness.lost()
        if not lost or self.losses == NO_MEETINGS:
            self._lost_since = None
            return ""
        if self._lost_since is None or self._lost_since[0] != self.losses:
            self._lost_since = self.losses, time.monotonic()
        waited = time.monotonic() - self._lost_since[1]
        if waited <= self._session.config.deadline_s:
            return ""
        return f"process {min(lost)} was lost, and this rank was in its own code for {waited:.0f} s since then"

    def close(self) -> None:
        """Stop looking."""
        self.over = True
        self._wires.close()
        with self._lock:
            self._liveness.close()
