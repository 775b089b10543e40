"""The local broker: this machine's cores, memory and GPUs, within the limits set on this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..model import Lease, Supply
from .slots import Slots

MEMORY_EVERY_S = 1.0
RESERVE = 0.1  # part of the free memory that is left alone


@dataclass(frozen=True)
class Machine:
    """What this process may use: cores, bytes of memory that are free, and GPUs."""

    cores: int
    free_bytes: int
    gpus: int


def read_machine(root: Path = Path("/")) -> Machine:
    """Return this machine's figures; `root` is where ``sys``, ``proc`` and ``dev`` are."""
    cores = len(os.sched_getaffinity(0))
    quota = _core_quota(root)
    if quota is not None:
        cores = max(1, min(cores, int(quota)))
    free = psutil.virtual_memory().available
    room = _memory_room(root)
    return Machine(cores, free if room is None else min(free, room), _gpus(root))


def _cgroups(root: Path) -> list[Path]:
    """Return this process's cgroup directories, v2 and v1, innermost first up to the top."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if controllers else [""]:
            top = root / "sys/fs/cgroup" / controller
            here = top / path.lstrip("/")
            found += [here, *(parent for parent in here.parents if parent == top or top in parent.parents)]
    return found


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None  # no such limit, or "max"


def _core_quota(root: Path) -> float | None:
    quotas = []
    for group in _cgroups(root):
        try:
            quota, period = (group / "cpu.max").read_text().split()
        except (OSError, ValueError):
            quota, period = str(_number(group / "cpu.cfs_quota_us")), str(_number(group / "cpu.cfs_period_us"))
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _memory_room(root: Path) -> int | None:
    rooms = []
    for group in _cgroups(root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                rooms.append(max(0, most - used))
    return min(rooms, default=None)


def _gpus(root: Path) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in (root / "dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def room(
    machine: Machine, held: int, *, slots: int | None, cores_per_rank: int, gpus_per_rank: int, peak_bytes: int
) -> tuple[int, str]:
    """Return how many more ranks fit beside the `held` ones, and what limits that. Pure."""
    total = slots if slots is not None else machine.cores // cores_per_rank
    named = f"{total} slots" if slots is not None else f"{machine.cores} cores, {cores_per_rank} a rank"
    limits = [(total - held, f"{named}, {held} in use")]
    if gpus_per_rank:
        limits.append((machine.gpus // gpus_per_rank - held, f"{machine.gpus} GPUs, {gpus_per_rank} a rank, {held} ranks"))
    fits = int(machine.free_bytes * (1 - RESERVE)) // max(peak_bytes, 1)
    limits.append((fits, f"{machine.free_bytes >> 20} MiB free, a rank takes {peak_bytes >> 20} MiB"))
    offered, why = min(limits, key=lambda limit: limit[0])
    return max(0, offered), why


class LocalBroker:
    """Offers this machine's slots.

    Parameters
    ----------
    slots : int, optional
        Slots to assume instead of counting cores; more than there are cores is oversubscription, on purpose.
    cores_per_rank, gpus_per_rank : int
        What a slot holds.
    leases : tuple of Lease
        Leases held from the start.
    read : callable
        Returns the machine's figures.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        slots: int | None = None,
        *,
        cores_per_rank: int = 1,
        gpus_per_rank: int = 0,
        leases: tuple[Lease, ...] = (),
        read: Callable[[], Machine] = read_machine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = {"slots": slots, "cores_per_rank": cores_per_rank, "gpus_per_rank": gpus_per_rank}
        self._slots = Slots(leases)
        self._read = read
        self._clock = clock
        self._machine = read()
        self._read_at = clock()
        self._offered = 0

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:
        """Return the supply; the machine's figures are read anew once a second at most."""
        if self._clock() - self._read_at >= MEMORY_EVERY_S:
            self._machine = self._read()
            self._read_at = self._clock()
        held = self._slots.leases
        self._offered, why = room(self._machine, len(held), peak_bytes=peak_bytes, **self._limits)  # type: ignore[arg-type]
        return Supply(self._offered, held, (), why)

    def request(self, n: int, deadline_s: float) -> None:
        """Grant `n` slots, as far as the last poll offered them."""
        before = len(self._slots.leases)
        self._slots.grant(n, self._offered)
        granted = len(self._slots.leases) - before
        self._offered -= granted

    def release(self, leases: tuple[Lease, ...]) -> None:
        """Take `leases` back."""
        self._slots.release(leases)
