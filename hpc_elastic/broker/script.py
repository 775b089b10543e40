"""The scripted broker: a timetable of how many slots there are. For tests and demonstrations."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..model import Lease, Supply
from .slots import Slots

if TYPE_CHECKING:
    from collections.abc import Iterable

ENTRY = re.compile(r"(?P<step>[0-9]+):(?P<slots>[0-9]+)")
EXAMPLE = '"0:1,20:3" (1 slot at first, 3 from step 20 on)'


class ScriptBroker:
    """Offers what a timetable says, and takes back what it no longer says.

    Parameters
    ----------
    entries : iterable of (int, int)
        Pairs of a step and the number of slots that there are from then on; none before the first.
    leases : tuple of Lease
        Leases held from the start.

    Raises
    ------
    ConfigError
        If the steps don't increase.
    """

    def __init__(self, entries: Iterable[tuple[int, int]], leases: tuple[Lease, ...] = ()) -> None:
        self.entries = tuple(entries)
        for before, after in itertools.pairwise(self.entries):
            if after[0] <= before[0]:
                raise ConfigError(f"supply: step {after[0]} comes after step {before[0]}; steps must increase")
        self._slots = Slots(leases)
        self._total = self._at(0)

    @classmethod
    def parse(cls, text: str, leases: tuple[Lease, ...] = ()) -> ScriptBroker:
        """Return the broker for a timetable such as ``"0:1,20:3,40:2"``; `ConfigError` if it can't be read."""
        entries = []
        for part in text.split(","):
            match = ENTRY.fullmatch(part.strip(" "))
            if match is None:
                raise ConfigError(f"supply: {part.strip(' ')!r} is not STEP:SLOTS, as in {EXAMPLE}")
            entries.append((int(match["step"]), int(match["slots"])))
        return cls(entries, leases)

    def _at(self, step: int) -> int:
        return next((slots for start, slots in reversed(self.entries) if start <= step), 0)

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:  # noqa: ARG002
        """Return the supply at `step`; the highest slots are taken back first."""
        self._total = self._at(step)
        held = self._slots.leases
        over = max(0, len(held) - self._total)
        revoked = tuple(sorted(held, key=lambda lease: lease.slot)[len(held) - over :])
        why = f"{self._total} slots by the script, {len(held)} in use"
        barred = self._slots.barred
        why += f", {barred} not used for a while: a rank could not start" if barred else ""
        return Supply(max(0, self._total - len(held) - barred), held, revoked, why)

    def next_step(self, step: int) -> float:
        """Return the step of the next entry; infinity after the last."""
        return next((start for start, _ in self.entries if start > step), math.inf)

    def request(self, n: int, deadline_s: float) -> None:  # noqa: ARG002
        """Grant `n` slots at once, as far as the timetable has them."""
        self._slots.grant(n, max(0, self._total - len(self._slots.leases) - self._slots.barred))

    def withdraw(self) -> None:
        """Nothing is ever pending."""

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Take `leases` back; their slots are not offered for `bar_s` seconds."""
        self._slots.release(leases, bar_s)
