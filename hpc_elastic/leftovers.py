"""What a run leaves on this host when it fails: processes, known by their environment, and shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from .comm.vendor import VENDORS, named, orphaned_files, orphaned_shared_memory
from .config import RUN_VARIABLE
from .processes import ENVIRON_END, PARENT, fields, is_stopped

PROC = Path("/proc")
GONE_WITHIN_S, BEGUN_WITHIN_S = 5.0, 1.0
LOOK_S, MOMENT_S = 0.01, 0.0002
HOST = os.uname().nodename


def belongs(pid: int, run: Path) -> bool:
    """Tell whether process `pid` of this host runs for `run`; one that has ended does not, be it a zombie."""
    try:
        environ = _environ(PROC / str(pid))
    except OSError:
        return False
    mark = f"{RUN_VARIABLE}=".encode()
    for entry in environ.split(b"\0"):
        if entry.startswith(mark):
            value = os.fsdecode(entry.removeprefix(mark))
            with contextlib.suppress(OSError):
                return Path(value).samefile(run)  # a run can have several names
            return value == str(run)
    return False


def _environ(process: Path) -> bytes:
    """Return the environment of a process; while it begins a program, it has none to be seen for a moment."""
    before, deadline = "0", time.monotonic() + BEGUN_WITHIN_S
    while not (environ := (process / "environ").read_bytes()) and time.monotonic() < deadline:
        (process / "exe").readlink()  # fails for who has ended, and for the kernel's own, which have no environment either
        found = fields(int(process.name))
        end = found[ENVIRON_END] if found else "0"  # where it ends in memory, 0 if it is not there yet
        if end == before != "0":
            break  # it has an empty one, and no other since the last look
        before = end
        time.sleep(MOMENT_S)
    return environ


def processes(run: Path) -> list[int]:
    """Return this user's processes that run for `run`, without this one and those above it."""
    spared, user = _line(), os.geteuid()
    found = []
    for entry in os.scandir(PROC):
        if entry.name.isdecimal() and int(entry.name) not in spared:
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == user and belongs(int(entry.name), run):
                    found.append(int(entry.name))
    return found


def stopped(run: Path) -> list[int]:
    """Return the processes of `run` that are stopped."""
    return [pid for pid in processes(run) if is_stopped(pid)]


def end(pids: Iterable[int]) -> None:
    """Kill processes."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _line() -> set[int]:
    """Return the process ids of this process and of all above it."""
    found, pid = set[int](), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        pid = int((fields(pid) or ["", "0"])[PARENT])
    return found


def remove(run: Path, since: float) -> list[int]:
    """Kill the processes of `run`, remove shared memory of after the time `since` that nobody maps; return those left."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := processes(run)) and time.monotonic() < deadline:
        end(left)
        time.sleep(LOOK_S)
    remove_shared_memory(since)
    return left


def gone(run: Path, within_s: float) -> bool:
    """Wait until no process of `run` is left, at most `within_s` seconds; tell whether that is so."""
    deadline = time.monotonic() + within_s
    while there := bool(processes(run)):
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    return not there


def await_proxies(run: Path) -> None:
    """Wait a moment until the launchers' own processes have ended, which a killed launcher leaves behind."""
    names = {vendor.proxy for vendor in VENDORS if vendor.proxy}
    deadline = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < deadline and any(belongs(pid, run) for name in names for pid in named(name)):
        time.sleep(LOOK_S)


def remove_shared_memory(since: float) -> None:
    """Remove shared memory of after the time `since` that nobody maps, and files of launchers that were killed."""
    for segment in orphaned_shared_memory(since):
        segment.unlink(missing_ok=True)
    for file in orphaned_files(since):
        file.unlink(missing_ok=True)
