"""One attempt at a job: its launcher, the ranks' signs of life, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from . import leftovers
from .errors import RunDirectoryError
from .outputs import Relay
from .rundir import Failure, RunDirectory

GRACE_S, SHORT_GRACE_S = 5.0, 1.0  # for the launcher to end its ranks; those of a job that is lost need none
FAILED_S = 10.0  # how long ranks have to say why they were lost
PIPES_S = 0.5  # and the launcher, to pass that on: it would wait for any child of theirs that has the end of a pipe
THERE = ("member", "parked")
SILENCE = 2  # times stall_s: a rank that stalls is the others' business first
LOOK_S = 1.0
PROXY_S, HEADLESS_S = 0.25, 1.0
WRITTEN_S = 0.5  # how long processes of a job that has ended may write


def beats(folder: Path) -> dict[str, int]:
    """Return the signs of life in `folder`: when each was touched, by the clock of whoever did."""
    found = {}
    with contextlib.suppress(OSError):  # a file system that has a bad moment
        for entry in os.scandir(folder):
            if entry.name.endswith(".beat"):
                found[entry.name] = entry.stat().st_mtime_ns
    return found


class Pulse:
    """Signs of life: files that each rank touches. What counts is that one changes, seen by this process's own clock.

    Parameters
    ----------
    folder : Path
        Where the files ``ID.beat`` are.
    clock : callable
        Seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._seen: dict[str, int] = {}
        self._alive = self._looked = clock()

    def silence(self, stall_s: float, deadline_s: float) -> str:
        """Look; return what is wrong if no rank has shown a sign of life for too long, else nothing."""
        now = self._clock()
        between, self._looked = now - self._looked, now
        seen = beats(self._folder)
        # Whoever was stopped for long itself, this process or the whole machine, can't blame the others.
        if between > stall_s or any(seen[name] != self._seen.get(name) for name in seen):
            self._alive = now
        self._seen |= seen
        limit_s = SILENCE * stall_s if self._seen else deadline_s
        return f"no sign of life from any rank for {limit_s:g} s" if now - self._alive > limit_s else ""

    def silent_s(self) -> float:
        """Return for how long there has been no sign of life, as far as was looked."""
        return self._clock() - self._alive


def _has_child(pid: int, name: str) -> bool:
    """Tell whether process `pid` has a child of this `name` that lives."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.Error):
                if child.name()[:15] == name[:15] and child.status() != psutil.STATUS_ZOMBIE:
                    return True
    return False


def _may_read() -> bool:
    """Tell whether this process may read its stdin: in the background of a terminal, what is typed is the shell's.

    The launcher has a session of its own, where nothing would stop it.
    """
    if not os.isatty(0):
        return True
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # the terminal of another session
        return False


class Attempt:
    """A job under its launcher.

    Parameters
    ----------
    run : RunDirectory
        The run.
    command : list of str
        What starts it.
    environ : mapping
        Its environment.
    directory : str
        Its working directory.
    outlived : bool
        True if ranks with a launcher of their own can go on without it.
    proxy : str
        Name of the process between the launcher and the ranks, without which the launcher is no good; if there is one.

    Attributes
    ----------
    process : subprocess.Popen
        The launcher.
    hangs : str
        Why it was given up, if it showed no sign of life.
    lingers : bool
        True if the job has ended well, but a process of it is stopped and will not end.
    """

    def __init__(
        self,
        run: RunDirectory,
        command: list[str],
        environ: Mapping[str, str],
        directory: str,
        *,
        outlived: bool,
        proxy: str = "",
    ) -> None:
        self._run = run
        self._outlived = outlived
        self._begun = time.time()
        self._pulse = Pulse(run.path / "ranks")
        self._next_look = self._failed_since = self._gone_since = self._well_since = 0.0
        self._proxy, self._next_proxy, self._headless_since = proxy, 0.0, 0.0
        self.lingers = False
        self.hangs = ""
        self._relay = Relay()
        try:
            self.process = subprocess.Popen(
                command,
                env=environ,
                cwd=directory,
                stdin=None if _may_read() else subprocess.DEVNULL,
                stdout=self._relay.stdout,
                stderr=self._relay.stderr,
                start_new_session=True,
            )
        finally:
            self._relay.begun()

    def over(self, stall_s: float, deadline_s: float, *, well: bool) -> bool:
        """Tell whether it is over, and record why if it hangs; `well` if the job itself has ended well.

        Raises
        ------
        RunDirectoryError
            If the run directory can't be read at the moment.
        """
        now = time.monotonic()
        self._end_headless(now)
        lost = self._failed_as() in ("lost", "interrupted")  # errors end by themselves
        if self.process.poll() is not None:
            if lost or not (self._outlived and self._ranks_run(stall_s)):
                return True
        elif lost and self._lingers(now, stall_s):
            return True
        if well:
            # What follows he.run in a script may take its time; but a process that is stopped will never end.
            self._well_since = self._well_since or now
            if now - self._well_since > SILENCE * stall_s and now >= self._next_look:
                self._next_look = now + LOOK_S
                self.lingers = bool(leftovers.stopped(self._run.path))
            return self.lingers
        if now < self._next_look:
            return False
        self._next_look = now + min(LOOK_S, stall_s / 4)
        self.hangs = self._pulse.silence(stall_s, deadline_s)
        if self.hangs:
            lose(self._run, self.hangs)
        return bool(self.hangs)

    def _end_headless(self, now: float) -> None:
        """End a launcher whose process between it and the ranks is gone: nobody hears or tells it anything."""
        if not self._proxy or now < self._next_proxy or self.process.poll() is not None:
            return
        self._next_proxy = now + PROXY_S
        if _has_child(self.process.pid, self._proxy):
            self._headless_since = now
        # Not one that is about to end; but while ranks run, what they print is lost.
        elif 0 < self._headless_since < now - (HEADLESS_S if self._outlived or not self._ranks_run(0.0) else 0.0):
            self.process.kill()

    def _ranks_run(self, stall_s: float) -> bool:
        """Tell whether ranks are there, as they can be without this launcher: some have one of their own."""
        records = self._run.records()
        if any(
            record.member.host == leftovers.HOST and leftovers.belongs(record.member.pid, self._run.path)
            for record in records
        ):
            return True
        away = [record.member.id for record in records if record.member.host != leftovers.HOST and record.outcome in THERE]
        # One whose host is gone says nothing any more, nor does its guard.
        there = any(self._run.end_of(member) is None and not self._run.is_condemned(member) for member in away)
        return there and self._pulse.silent_s() < stall_s

    def _lingers(self, now: float, stall_s: float) -> bool:
        """Tell whether the job was lost a while ago, and yet the launcher does not end."""
        self._failed_since = self._failed_since or now
        if self._ranks_run(stall_s):
            return now - self._failed_since > FAILED_S
        self._gone_since = self._gone_since or now
        return now - self._gone_since > PIPES_S

    def _failed_as(self) -> str:
        """Return the kind of the job's failure, or nothing."""
        failure = self._run.failure() if self._run.failed() else None
        return failure.kind if failure is not None else ""

    def _end(self, grace_s: float) -> None:
        """End the launcher and whatever is left of its session's process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            self._await(grace_s)

    def _await(self, seconds: float) -> None:
        """Wait for the launcher's end."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _kill_ranks(self) -> None:
        """Kill the ranks of this host: one that wakes up now must not go on. Their guards tell the launcher, which ends."""
        for record in self._run.records():
            if record.member.host == leftovers.HOST and leftovers.belongs(record.member.pid, self._run.path):
                with contextlib.suppress(OSError):
                    os.kill(record.member.pid, signal.SIGKILL)
        self._await(PIPES_S)

    def clean(self, *, thoroughly: bool) -> list[int]:
        """Remove what is left of it on this host, `thoroughly` every process of the run; return those that don't end."""
        grace_s = GRACE_S
        with contextlib.suppress(RunDirectoryError):
            if self._failed_as() == "lost":
                self._kill_ranks()
                grace_s = SHORT_GRACE_S
        self._end(grace_s)
        left: list[int] = []
        if thoroughly:
            left = leftovers.remove(self._run.path, self._begun)
        else:
            leftovers.end(leftovers.stopped(self._run.path))  # such as a warm parent, which would never see that it is over
            leftovers.await_proxies(self._run.path)
            leftovers.remove_shared_memory(self._begun)
        with contextlib.suppress(OSError):
            if self._run.rests():
                leftovers.gone(self._run.path, 0.0 if thoroughly else WRITTEN_S)  # guards write to the end
                self._run.sweep()
        self._relay.finish()
        return left


def lose(run: RunDirectory, why: str, kind: str = "lost") -> None:
    """Record, in the supervisor's name, that the job has failed; a failure already recorded stays."""
    failure = Failure(error=why, traceback="", member=-1, rank=-1, host=leftovers.HOST, generation=-1, step=-1, kind=kind)
    try:
        run.fail(failure)
    except OSError:  # the run directory may be gone, or its disk full
        return
