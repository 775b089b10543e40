"""The leader's care for warm parents: what they import, and that its own host has one; agents see to those of companions."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from .. import warmth
from ..comm.starting import HERE, portable, without_session
from ..config import RUN_VARIABLE

if TYPE_CHECKING:
    from .leader import Leader

LOOK_S = 1.0
TRIES = 5
BACK_OFF_S = 5.0  # until it is started again; doubles each time


class Warming:
    """Sees to it that this host has a warm parent, as long as there may be newcomers.

    Parameters
    ----------
    leader : Leader
        The leader.
    """

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._next_look = self._next_try = 0.0
        self._tries, self._back_off_s = TRIES, BACK_OFF_S
        self._process: subprocess.Popen[bytes] | None = None
        self._modules: list[str] | None = None

    def look(self) -> None:
        """Start it where there is none; called at every turn."""
        session = self._leader.session
        now = session.clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        if self._leader.office.max_ranks <= self._leader.world.size or not self._worth():
            return
        if self._process is not None:
            self._process.poll()  # so that no zombie stays
        if self._tries and now >= self._next_try and not self._there():
            self._tries, self._next_try = self._tries - 1, now + self._back_off_s
            self._back_off_s *= 2
            self._start()

    def _worth(self) -> bool:
        """Tell whether it is wanted; and so much slower is the start of a process without."""
        if self._leader.session.config.warm == "off":
            return False
        if self._modules is None:
            self._modules = warmth.preloadable(dict(sys.modules), warmth.outside())
        return self._leader.session.config.warm == "on" or len(self._modules) >= warmth.WORTH

    def _there(self) -> bool:
        """Tell whether there is one: it has its lock."""
        try:
            descriptor = os.open(self._leader.session.run.path / "warm" / f"{HERE}.lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: the one that was started counts
            return self._process is not None and self._process.poll() is None
        finally:
            os.close(descriptor)
        return False

    def _start(self) -> None:
        run, session = self._leader.session.run, self._leader.session
        assert self._modules is not None
        environ = portable(without_session()) | {RUN_VARIABLE: str(run.path)}  # by which it is known to belong to the run
        command = [sys.executable, "-m", "hpc_elastic.warm", str(run.path)]
        spec = warmth.Spec(modules=self._modules, path=session.script.path, command=command, environ=environ)
        run.put(run.path / "warm" / "spec.json", spec)
        log = os.open(run.path / "warm" / f"{HERE}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        finally:
            os.close(log)

    def end(self) -> None:
        """End the one that was started here; others see that the run is over."""
        if self._process is not None:
            self._process.terminate()
