"""Numbered slots of one machine: what the local and the scripted broker have in common."""

from __future__ import annotations

from ..model import Lease


class Slots:
    """Leases of numbered slots; a request is granted at once, as far as there is room.

    Parameters
    ----------
    leases : tuple of Lease
        Leases held from the start.
    """

    def __init__(self, leases: tuple[Lease, ...] = ()) -> None:
        self.leases = leases

    def grant(self, n: int, room: int) -> None:
        """Add up to `n` leases of the lowest free slots, `room` at most."""
        taken = {lease.slot for lease in self.leases}
        free = (slot for slot in range(len(taken) + max(n, 0)) if slot not in taken)
        self.leases += tuple(Lease(slot) for slot, _ in zip(free, range(min(n, room)), strict=False))

    def release(self, leases: tuple[Lease, ...]) -> None:
        """Give `leases` back; those not held are ignored."""
        gone = {lease.slot for lease in leases}
        self.leases = tuple(lease for lease in self.leases if lease.slot not in gone)
