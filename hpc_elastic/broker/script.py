"""The scripted broker: a timetable of how many slots there are. For tests and demonstrations."""

from __future__ import annotations

import itertools

from ..errors import ConfigError
from ..model import Lease, Supply
from .slots import Slots


class ScriptBroker:
    """Offers what a timetable says, and takes back what it no longer says.

    Parameters
    ----------
    entries : tuple of (int, int)
        From step ``entries[i][0]`` on there are ``entries[i][1]`` slots; none before the first.
    leases : tuple of Lease
        Leases held from the start.
    """

    def __init__(self, entries: tuple[tuple[int, int], ...], leases: tuple[Lease, ...] = ()) -> None:
        self.entries = entries
        self._slots = Slots(leases)
        self._total = 0

    @classmethod
    def parse(cls, text: str, leases: tuple[Lease, ...] = ()) -> ScriptBroker:
        """Return the broker for a timetable such as ``"0:1,20:3,40:2"``.

        Raises
        ------
        ConfigError
            If it can't be read, or its steps don't increase.
        """
        entries = []
        for part in text.replace(" ", "").split(","):
            step, colon, slots = part.partition(":")
            if not (colon and step.isdigit() and slots.isdigit()):
                raise ConfigError(f'supply: {part!r} is not STEP:SLOTS, as in "0:1,20:3"')
            entries.append((int(step), int(slots)))
        for before, after in itertools.pairwise(entries):
            if after[0] <= before[0]:
                raise ConfigError(f"supply: step {after[0]} comes after step {before[0]}; steps must increase")
        return cls(tuple(entries), leases)

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:
        """Return the supply at `step`; the highest slots are taken back first."""
        self._total = next((slots for start, slots in reversed(self.entries) if start <= step), 0)
        held = self._slots.leases
        over = max(0, len(held) - self._total)
        revoked = tuple(sorted(held, key=lambda lease: lease.slot)[len(held) - over :])
        why = f"{self._total} slots by the script, {len(held)} in use"
        return Supply(max(0, self._total - len(held)), held, revoked, why)

    def request(self, n: int, deadline_s: float) -> None:
        """Grant `n` slots, as far as the timetable has them."""
        self._slots.grant(n, max(0, self._total - len(self._slots.leases)))

    def release(self, leases: tuple[Lease, ...]) -> None:
        """Take `leases` back."""
        self._slots.release(leases)
