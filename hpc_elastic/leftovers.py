"""What a run leaves on this host when it fails: processes, known by their environment, shared memory, and files."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path

from .comm.liveness import alive
from .comm.vendor import launchers_files, orphaned_shared_memory
from .config import RUN_VARIABLE

PROC = Path("/proc")
GONE_WITHIN_S = 5.0
LOOK_S = 0.01
HOST = os.uname().nodename


def belongs(pid: int, run: Path) -> bool:
    """Tell whether process `pid` of this host runs for `run`; one that has ended does not, be it a zombie."""
    try:
        environ = (PROC / str(pid) / "environ").read_bytes()
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


def stopped(run: Path) -> bool:
    """Tell whether a process of `run` is stopped (proc(5), state T)."""
    for pid in processes(run):
        with contextlib.suppress(OSError):
            if (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
                return True
    return False


def _line() -> set[int]:
    """Return the process ids of this process and of all above it."""
    found, pid = set[int](), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int((PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
    return found


def children(pid: int) -> list[int] | None:
    """Return the children of process `pid` that live, or None if the kernel does not tell (proc(5), ``task/…/children``)."""
    found = []
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    except OSError:
        return None
    return [child for child in found if alive(child)]


def files(run: Path) -> set[Path]:
    """Return the files that launchers of `run` have open, and would leave if they were killed."""
    return {path for pid in processes(run) for path in launchers_files(pid)}


def gone(run: Path, within_s: float) -> bool:
    """Wait until no process of `run` is left, at most `within_s` seconds; tell whether that is so."""
    deadline = time.monotonic() + within_s
    while there := bool(processes(run)):
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    return not there


def remove(run: Path, since: float, noted: Iterable[Path] = ()) -> list[int]:
    """Kill the processes of `run` and remove what they leave; return those that don't end.

    What they leave is shared memory of after the time `since` that nobody maps, and the files of launchers, those `noted`
    while they were open and those that are open now.
    """
    noted = {*noted, *files(run)}
    deadline = time.monotonic() + GONE_WITHIN_S
    while (left := processes(run)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_S)
    remove_rests(run, since, noted)
    return left


def remove_rests(run: Path, since: float, noted: Collection[Path]) -> None:
    """Remove shared memory of after the time `since` that nobody maps, and `noted` files that nobody of `run` has open."""
    for segment in orphaned_shared_memory(since):
        segment.unlink(missing_ok=True)
    for file in set(noted) - files(run) if noted else ():
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
