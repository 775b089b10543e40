"""What the leader announces at a resize, and what it hands over to the next leader."""

from __future__ import annotations

from collections.abc import Collection
from typing import Self

import msgspec

from ..model import Cursor, Lease, Member
from ..redistribute import Form


class Parked(msgspec.Struct, frozen=True):
    """A rank put to sleep; whoever was in its last generation can wake it, through that generation's communicator."""

    member: Member
    tether: int
    rank: int


class Office(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader knows and the next one has to know. Replicated at every resize, and kept in a file for a lost leader.

    `target` is the number of ranks that the last resize led to: after a loss, replacements are asked for up to that.
    `generation` is the one that it led to. `stops`, `saves` and `told` are what was asked for and is not done yet: to stop,
    and why; a checkpoint; that these processes leave. `saved_step` is the
    step of the last snapshot for a checkpoint, `saved_s` the time of day then, in seconds, or 0 for none.
    """

    next_member: int
    max_ranks: int
    target: int = 1
    generation: int = 0
    decided: int = 0
    asked: int | None = None
    leases: tuple[Lease, ...] = ()
    leaving: tuple[Member, ...] = ()
    parked: tuple[Parked, ...] = ()
    peak_bytes: int = 0
    told_of_parking: bool = False
    stops: str = ""
    saves: bool = False
    saved_step: int = 0
    saved_s: float = 0.0
    told: tuple[int, ...] = ()

    def told_but(self, gone: Collection[int]) -> tuple[int, ...]:
        """Return whom it was told to leave, but those that are `gone`."""
        return tuple(number for number in self.told if number not in gone)


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics, summed over samples."""

    samples: int = 0
    sums: dict[str, float] = {}

    def plus(self, samples: int, metrics: dict[str, float]) -> Self:
        """Return the sums with one more step."""
        sums = {key: self.sums.get(key, 0.0) + value * samples for key, value in metrics.items()}
        return msgspec.structs.replace(self, samples=self.samples + samples, sums=sums)

    def means(self) -> dict[str, float]:
        """Return the metrics' means over the samples so far."""
        return {key: value / self.samples for key, value in self.sums.items()} if self.samples else {}


class Tally(Sums, frozen=True, kw_only=True):
    """Sums over the current epoch so far, which began at time `began`; and `recent` ones, since they were last reported."""

    began: float
    recent: Sums = Sums()

    def plus(self, samples: int, metrics: dict[str, float]) -> Self:
        """Return both with one more step."""
        return msgspec.structs.replace(super().plus(samples, metrics), recent=self.recent.plus(samples, metrics))

    def resumed(self, taken: float, now: float) -> Self:
        """Return what was taken down at time `taken` as if the epoch had gone on `now`: what lay between does not count."""
        return msgspec.structs.replace(self, began=self.began + now - taken)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One resize, as all take part in it.

    Attributes
    ----------
    generation : int
        Number of the generation that it leads to.
    members : tuple of Member
        Ranks before the resize, followed by the newcomers.
    joining : int
        How many of them are newcomers.
    leavers : tuple of int
        Which of them leave.
    parks : bool
        True if some of the leavers are parked, so that this generation's communicator is kept.
    wait_s : float
        Seconds between the decision and this plan.
    point : int
        Number of the resize point at which this happens, over all loops.
    losses : int
        Losses that the job has gone on after so far.
    """

    generation: int
    loop: int
    point: int
    losses: int
    members: tuple[Member, ...]
    joining: int
    leavers: tuple[int, ...]
    reason: str
    wait_s: float
    cursor: Cursor
    tally: Tally
    office: Office
    forms: tuple[Form, ...]

    @property
    def parks(self) -> bool:
        """True if some of the leavers are put to sleep instead of ended."""
        return any(self.members[rank].parks for rank in self.leavers)
