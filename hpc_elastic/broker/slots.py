"""Numbered slots of one machine: what the local and the scripted broker have in common."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from ..model import Lease


class Slots:
    """Leases of numbered slots; a request is granted at once, as far as there is room.

    Parameters
    ----------
    leases : tuple of Lease
        Leases held from the start.
    clock : callable
        Seconds.
    """

    def __init__(self, leases: tuple[Lease, ...] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self.leases = leases
        self._clock = clock
        self._bars: dict[int, float] = {}  # slot -> until when it is not used

    @property
    def barred(self) -> int:
        """How many free slots are not to be used for the moment."""
        now = self._clock()
        self._bars = {slot: until for slot, until in self._bars.items() if until > now}
        return len(self._bars)

    def grant(self, n: int, room: int) -> None:
        """Add up to `n` leases of the lowest free slots, `room` at most."""
        taken = {lease.slot for lease in self.leases} | (self._bars.keys() if self.barred else set())
        free = (slot for slot in itertools.count() if slot not in taken)
        self.leases += tuple(Lease(slot) for slot in itertools.islice(free, max(0, min(n, room))))

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Give `leases` back; those not held are ignored. They are not used for `bar_s` seconds."""
        gone = {lease.slot for lease in leases}
        held = {lease.slot for lease in self.leases}
        self.leases = tuple(lease for lease in self.leases if lease.slot not in gone)
        if bar_s > 0:
            self._bars |= dict.fromkeys(gone & held, self._clock() + bar_s)
