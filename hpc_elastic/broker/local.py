"""The local broker: this machine's cores, memory and GPUs, within the limits set on this process."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ..model import Lease, Supply
from ..protocols import Stepless
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable

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
    groups = _cgroups(root)
    cores = min([len(os.sched_getaffinity(0)), *_core_quotas(groups)])
    free = min([psutil.virtual_memory().available, *_memory_rooms(groups)])
    return Machine(max(1, int(cores)), free, _gpus(root))


def _cgroups(root: Path) -> list[Path]:
    """Return this process's cgroup directories, v2 and v1, with those above them: every level has its limits.

    In a container, the paths in ``/proc/self/cgroup`` may be the host's; then only the top is there, and the right one.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in {"", "cpu", "memory"}.intersection(controllers.split(",")):  # v2 names none
            top, parts = root / "sys/fs/cgroup" / controller, Path(path.lstrip("/")).parts
            found += [top.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return found


def _numbers(file: Path) -> list[int]:
    """Return the numbers on the first line of `file`; none if there is no such file, or it says "max"."""
    try:
        return [int(word) for word in file.read_text().split("\n", 1)[0].split()]
    except (OSError, ValueError):
        return []


def _core_quotas(groups: list[Path]) -> list[float]:
    found = []
    for group in groups:
        v2 = _numbers(group / "cpu.max")
        v1 = _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")
        found += [both[0] / both[1] for both in (v2, v1) if len(both) == 2 and min(both) > 0]  # noqa: PLR2004
    return found


def _memory_rooms(groups: list[Path]) -> list[int]:
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    found = []
    for group, (limit, usage, cache) in itertools.product(groups, (v2, v1)):
        most, used = _numbers(group / limit), _numbers(group / usage)
        if most and used:
            found.append(max(0, most[0] - used[0] + _cached(group / "memory.stat", cache)))
    return found


def _cached(stat: Path, name: str) -> int:
    """Return the bytes of file pages that the kernel drops when memory is asked for: reading shards fills a cgroup."""
    try:
        fields = dict(line.split() for line in stat.read_text().splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def _gpus(root: Path) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sum(path.name[6:].isdigit() for path in (root / "dev").glob("nvidia[0-9]*"))
    names = [name.strip() for name in visible.split(",")]
    # CUDA sees the devices before the first that does not exist; launchers write "-1" or "NoDevFiles" for none.
    return len(list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names)))


@dataclass(frozen=True)
class Slot:
    """What one rank takes: cores, GPUs, and the number of slots to assume, if cores are not to be counted."""

    cores: int = 1
    gpus: int = 0
    slots: int | None = None


def room(machine: Machine, slot: Slot, held: int, peak_bytes: int, unseen: int = 0) -> tuple[int, str]:
    """Return how many more ranks fit, and what limits that. Pure.

    Parameters
    ----------
    machine : Machine
        What there is.
    slot : Slot
        What a rank takes.
    held : int
        Leases held.
    peak_bytes : int
        Most memory that a rank has taken so far.
    unseen : int
        Leases among those held whose memory was not yet taken when the machine was read.
    """
    if slot.slots is not None:
        total, named = slot.slots, f"{slot.slots} slots"
    else:
        total = machine.cores // slot.cores
        named = f"{machine.cores} cores" + (f", {slot.cores} a rank" if slot.cores > 1 else "")
    offered, why = total - held, f"{named}, {held} in use"
    if slot.gpus and (fits := machine.gpus // slot.gpus - held) < offered:
        offered, why = fits, f"{machine.gpus} GPUs, {slot.gpus} a rank, {held} ranks"
    if (fits := int(machine.free_bytes * (1 - RESERVE)) // max(peak_bytes, 1) - unseen) < offered:
        offered, why = fits, f"{machine.free_bytes >> 20} MiB free, a rank takes {peak_bytes >> 20} MiB"
    return max(0, offered), why


class LocalBroker(Stepless):
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

    def __init__(  # settings, all of them named
        self,
        slots: int | None = None,
        *,
        cores_per_rank: int = 1,
        gpus_per_rank: int = 0,
        leases: tuple[Lease, ...] = (),
        read: Callable[[], Machine] = read_machine,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slot = Slot(cores_per_rank, gpus_per_rank, slots)
        self._slots = Slots(leases, clock)
        self._read = read
        self._clock = clock
        self._machine = read()
        self._read_at = clock()
        self._peak_bytes = 0
        self._unseen = 0

    def _room(self) -> tuple[int, str]:
        offered, why = room(self._machine, self._slot, len(self._slots.leases), self._peak_bytes, self._unseen)
        barred = self._slots.barred
        return max(0, offered - barred), why + (f", {barred} not used for a while: a rank could not start" if barred else "")

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:  # noqa: ARG002
        """Return the supply; the machine's figures are read anew once in `MEMORY_EVERY_S` at most."""
        now = self._clock()
        if now - self._read_at >= MEMORY_EVERY_S:
            self._machine, self._read_at, self._unseen = self._read(), now, 0
        self._peak_bytes = peak_bytes
        offered, why = self._room()
        return Supply(offered, self._slots.leases, (), why)

    def request(self, n: int, deadline_s: float) -> None:  # noqa: ARG002
        """Grant `n` slots at once, as far as there is room."""
        before = len(self._slots.leases)
        self._slots.grant(n, self._room()[0])
        self._unseen += len(self._slots.leases) - before

    def withdraw(self) -> None:
        """Nothing is ever pending."""

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Take `leases` back; their slots are not offered for `bar_s` seconds."""
        self._slots.release(leases, bar_s)
