"""Keeps a warm parent on this host: starts one where none has the lock, and no second time one that can't serve.

Imports the standard library alone, and nothing of the package: the agent of a companion loads it by its path.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time

LOOK_S = 1.0
TRIES, BACK_OFF_S = 5, 5.0  # how often it is started; until it is started again, doubling
STEADY_S = 30.0  # one that has listened for so long was a success: there are all tries again


class Keeper:
    """Keeps the warm parent of this host, for the run in the folder `run`."""

    def __init__(self, run: str) -> None:
        self.folder, self.host = os.path.join(run, "warm"), os.uname().nodename
        self.started: list[subprocess.Popen[bytes]] = []
        self.next_look = self.next_try = 0.0
        self.steady_at = float("inf")
        self.refill()

    def refill(self) -> None:
        """Have all tries again."""
        self.tries, self.back_off_s = TRIES, BACK_OFF_S

    def file(self, kind: str) -> str:
        """Return the path of what this host's warm parent has, or says."""
        return os.path.join(self.folder, f"{self.host}.{kind}")

    def due(self) -> bool:
        """Tell whether one is to be started now."""
        now = time.monotonic()
        # One that was just started is left alone, as a look at the lock holds that for a moment.
        if now < max(self.next_look, self.next_try):
            return False
        self.next_look = now + LOOK_S
        self.started = [process for process in self.started if process.poll() is None]  # so that no zombie stays
        there = self.there()
        if not there or not os.path.exists(self.file("sock")):
            self.steady_at = now + STEADY_S
        elif now >= self.steady_at:
            self.refill()
        return not there and self.tries > 0 and not self.refused()

    def there(self) -> bool:
        """Tell whether there is one: it has its lock, unless it is stale and serves only whom it has forked."""
        try:
            descriptor = os.open(self.file("lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: those that were started count
            return bool(self.started)
        finally:
            os.close(descriptor)
        return False

    def refused(self) -> bool:
        """Tell whether one has found that it can't serve, with what is to be imported now."""
        try:
            return os.stat(self.file("refused")).st_mtime_ns >= os.stat(os.path.join(self.folder, "spec.json")).st_mtime_ns
        except OSError:
            return False

    def start(self) -> str:
        """Start one, as ``spec.json`` says; return why it could not be started, or nothing."""
        self.tries, self.next_try = self.tries - 1, time.monotonic() + self.back_off_s
        self.back_off_s *= 2
        try:
            with open(os.path.join(self.folder, "spec.json"), "rb") as file:
                spec = json.load(file)
            log = os.open(self.file("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            null = subprocess.DEVNULL
            try:
                self.started.append(
                    subprocess.Popen(spec["command"], env=spec["environ"], stdin=null, stdout=log, stderr=log)
                )
            finally:
                os.close(log)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            return f"no warm parent: {problem}"
        return ""

    def end(self) -> None:
        """End those that were started here: when whom they have forked have ended, as they alone know how."""
        for process in self.started:
            process.terminate()
