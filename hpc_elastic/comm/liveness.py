"""Which processes live: by a descriptor of the process on this host, else by its guard's record and its signs of life."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable

from ..model import Member
from ..processes import alive
from ..rundir import RunDirectory

BEATS_EVERY_S = 1.0
HURRY_S = 0.02
SILENT_S = 3.0  # without a sign of life, after which it is looked whether a process's host is there
GUARD_S = 5.0  # how long a condemned process of another host is waited for
DEAF_S, DEAF_LOOKS = 1.0, 200  # how long, and how many looks, a rank waits for messages that it knows were sent
DEAF_EVERY_S = 0.01  # pause between looks whether they were
LEFT = ("retired", "parked", "cancelled", "ended")


class Beats:
    """Signs of life, by which a stalled process is told from a slow one.

    Parameters
    ----------
    run : RunDirectory
        Where processes give them.
    stall_s : float
        Seconds without one after which a process has stalled.
    """

    def __init__(self, run: RunDirectory, stall_s: float) -> None:
        self._run = run
        self.stall_s = stall_s
        self._seen: dict[int, tuple[float, float]] = {}  # process -> time of its last sign, and when that was seen
        self._looked = time.monotonic()

    def stalled(self, number: int) -> bool:
        """Tell whether process `number` has given signs of life, but none for too long."""
        return self.silence(number) > self.stall_s

    def silence(self, number: int) -> float:
        """Return for how many seconds process `number` has given no sign of life; 0 if it never has."""
        now = time.monotonic()
        if now - self._looked > max(self.stall_s - BEATS_EVERY_S, 1.5 * BEATS_EVERY_S):
            # Who was stopped for long itself, with the whole machine or the whole job, can't blame the others.
            self._seen = {other: (beat, now) for other, (beat, _) in self._seen.items()}
        self._looked = now
        try:
            beat = self._run.beat_file(number).stat().st_mtime
        except OSError:
            return 0.0
        # Only a change counts, by the clock here: clocks of hosts and file servers differ.
        if self._seen.get(number, (0.0, 0.0))[0] != beat:
            self._seen[number] = beat, now
        return now - self._seen[number][1]

    def forget(self, numbers: Iterable[int]) -> None:
        """Forget processes."""
        for number in numbers:
            self._seen.pop(number, None)


class Liveness:
    """Watches the processes of a job.

    Parameters
    ----------
    run : RunDirectory
        Where guards record ends and ranks give signs of life.
    stall_s : float
        Seconds without a sign of life after which a process is ended, and so lost.
    """

    def __init__(self, run: RunDirectory, stall_s: float) -> None:
        self._run = run
        self._beats = Beats(run, stall_s)
        self._host = socket.gethostname()
        self._members: dict[int, Member] = {}
        self._descriptors: dict[int, int] = {}  # descriptor -> member
        self._poll = select.poll()
        self._gone: set[int] = set()
        self._condemned: dict[int, float] = {}
        self._silent: set[int] = set()
        self._next_beats = 0.0

    def watch(self, members: Iterable[Member]) -> None:
        """Watch these processes from now on, and no others."""
        own = os.getpid(), self._host
        wanted = {member.id: member for member in members if (member.pid, member.host) != own}
        for descriptor, number in list(self._descriptors.items()):
            if number not in wanted:
                self._close(descriptor)
        for number, member in wanted.items():
            if number not in self._members and member.host == self._host:
                try:
                    descriptor = os.pidfd_open(member.pid)
                except ProcessLookupError:
                    self._gone.add(number)
                    continue
                self._descriptors[descriptor] = number
                self._poll.register(descriptor, select.POLLIN)
        self._members = wanted
        self._gone &= wanted.keys()
        self._beats.forget(self._condemned.keys() - wanted.keys())
        self._condemned = {number: since for number, since in self._condemned.items() if number in wanted}

    def _close(self, descriptor: int) -> None:
        del self._descriptors[descriptor]
        self._poll.unregister(descriptor)
        os.close(descriptor)

    def gone(self) -> frozenset[int]:
        """Return the numbers of those watched that have ended, in whatever way."""
        for descriptor, _ in self._poll.poll(0):
            self._gone.add(self._descriptors[descriptor])
            self._close(descriptor)
        now = time.monotonic()
        if now >= self._next_beats:
            self._next_beats = now + BEATS_EVERY_S
            self._look_for_stalls(now)
        return frozenset(self._gone)

    def hurry(self) -> None:
        """Look at other hosts' processes soon, since one of them may have ended."""
        self._next_beats = min(self._next_beats, time.monotonic() + HURRY_S)

    def lost(self) -> frozenset[int]:
        """Return those of `gone` that did not leave by themselves."""
        return frozenset(number for number in self.gone() if not self.left(number))

    def left(self, number: int) -> bool:
        """Tell whether a process says of itself that it is done with the job."""
        record = self._run.record(number)
        return record is not None and record.outcome in LEFT

    def _look_for_stalls(self, now: float) -> None:
        silent = set()
        for number, member in self._members.items():
            if number in self._gone:
                continue
            if member.host != self._host and self._run.end_of(number) is not None:
                self._gone.add(number)
            silence_s = self._beats.silence(number)
            if silence_s > SILENT_S:
                silent.add(number)
            if silence_s > self._beats.stall_s:
                self._condemn(number, member, now)
        self._silent = silent

    def silent(self) -> list[Member]:
        """Return those of other hosts of whom there has been no sign of life for some seconds: they may be lost."""
        there = [member for number, member in self._members.items() if number in self._silent and number not in self._gone]
        return [member for member in there if member.host != self._host]

    def give_up(self, members: Iterable[Member]) -> None:
        """Take `members` for lost, whose host does not answer any more."""
        for member in members:
            self._run.condemn(member.id)  # if it lives all the same
            self._gone.add(member.id)

    def _condemn(self, number: int, member: Member, now: float) -> None:
        begun = self._condemned.setdefault(number, now)
        if begun == now:
            self._run.condemn(number)
        if member.host == self._host:
            for descriptor in (d for d, n in self._descriptors.items() if n == number):
                with contextlib.suppress(ProcessLookupError):  # another rank was faster
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        elif now - begun > GUARD_S:
            self._gone.add(number)

    def close(self) -> None:
        """Close the descriptors."""
        self.watch(())

    def among(self, members: Collection[Member]) -> frozenset[int]:
        """Return the numbers of those of `members`, watched or not, that have ended."""
        gone = {number for number in self.gone() if any(member.id == number for member in members)}
        for member in members:
            if member.id in self._members:
                continue
            here = member.host == self._host
            if (here and not alive(member.pid)) or (not here and self._run.end_of(member.id) is not None):
                gone.add(member.id)
        return frozenset(gone)


class Deaf:
    """Finds out that a process hears nothing, though it looks often enough, and others have sent it something.

    Parameters
    ----------
    sent : callable
        Tells whether one of the others has.
    clock : callable
        Seconds.
    """

    def __init__(self, sent: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._sent = sent
        self._clock = clock
        self._since = float("inf")
        self._looks = 0
        self._next_look = 0.0

    def __call__(self, *, heard: bool) -> bool:
        """Take note of one look, and whether it was in vain; tell whether this process is deaf."""
        now = self._clock()
        if heard:
            self._since, self._looks = float("inf"), 0
        elif self._since == float("inf"):
            if now >= self._next_look:
                self._next_look = now + DEAF_EVERY_S
                self._since = now if self._sent() else self._since
        else:
            self._looks += 1  # one that was stopped itself has looked little
        return now - self._since > DEAF_S and self._looks > DEAF_LOOKS
