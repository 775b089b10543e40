"""Daemons: started in the foreground of sessions of their own, known by their process ids, ended for sure."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_children: dict[int, subprocess.Popen[bytes]] = {}  # of this process, so that it reaps them
LOOK_S = 0.01
FIRST_PORT = 10_000
END_S = 5.0


class ClusterError(Exception):
    """The cluster can't do what was asked; the message says what to do."""


def need(*programs: str) -> None:
    """Raise `ClusterError` if a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        raise ClusterError(
            f"{', '.join(missing)} not found: as root, run "
            "`apt-get install --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge iproute2`"
        )


@contextlib.contextmanager
def free_ports(n: int) -> Iterator[list[int]]:
    """Yield `n` ports of this machine that nobody uses, and that no other cluster gets while the block lasts.

    They are none that the kernel gives to whoever wants any: those are soon somebody's.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    there = [*range(FIRST_PORT, low), *range(high + 1, 1 << 16)]
    random.SystemRandom().shuffle(there)
    with contextlib.ExitStack() as claims:
        found: list[int] = []
        for port in there:
            if len(found) == n:
                break
            claim = claims.enter_context(socket.socket(socket.AF_UNIX))
            with contextlib.suppress(OSError), socket.socket() as probe:
                claim.bind(f"\0{__name__}.{port}")  # a name that is gone with this process
                probe.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) < n:
            raise ClusterError(f"{n} ports are needed, and {len(found)} are free: end other clusters")
        yield found


def start(folder: Path, name: str, command: list[str], environ: Mapping[str, str]) -> int:
    """Start a daemon, whose process id is written down below ``pid``, and return that."""
    with (folder / "log" / f"{name}.out").open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environ), start_new_session=True
        )
    _children[process.pid] = process
    note(folder, name, process.pid)
    return process.pid


def pid_of(folder: Path, name: str) -> int:
    """Return the process id of a daemon, or 0 if it does not run."""
    try:
        pid, since = map(int, (folder / "pid" / name).read_text().split())
    except (OSError, ValueError):
        return 0
    return pid if alive(pid) and _since(pid) == since else 0


def note(folder: Path, name: str, pid: int) -> None:
    """Write down which process a daemon is, and since when: the number may be another's one day."""
    (folder / "pid" / name).write_text(f"{pid} {_since(pid)}")


def _since(pid: int) -> int:
    """Return when a process began, in ticks since the machine did (proc(5)); 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except OSError:
        return 0


def alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie, which nobody reaps, does not."""
    if pid in _children:
        return _children[pid].poll() is None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def end(pids: list[int], first: signal.Signals = signal.SIGTERM) -> None:
    """End processes by a signal, and by force if need be."""
    for number in (first, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + END_S
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(LOOK_S)


def marked(mark: str) -> list[int]:
    """Return the processes in whose environment `mark` stands, but for this one and those above it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    spared, pid = {0}, os.getpid()
    while pid not in spared:
        spared.add(pid)
        with contextlib.suppress(OSError):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return [pid for pid in found if pid not in spared and alive(pid)]


def until(done: Callable[[], bool], limit_s: float, what: str) -> None:
    """Return when `done()` is true; `ClusterError` if that takes too long."""
    deadline = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {limit_s:g} s")
        time.sleep(LOOK_S)
