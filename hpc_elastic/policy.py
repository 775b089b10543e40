"""Policies: how many ranks to have, as a pure function of what is seen; and what a resize means for the ranks."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError, ResizeRefused
from .model import Observation, Resize
from .protocols import Stepless

if TYPE_CHECKING:
    from collections.abc import Collection

ENTRY = re.compile(r"(?P<step>[0-9]+):(?P<ranks>[0-9]+)(?:-(?P<leavers>[0-9]+(?:\+[0-9]+)*))?")
EXAMPLE = '"20:3,40:2-0" (3 ranks from step 20 on, 2 from step 40 on, rank 0 leaving)'


def bounded(seen: Observation, wanted: int, reason: str, leavers: tuple[int, ...] = ()) -> Resize | None:
    """Return the resize to `wanted` ranks, as far as limits and supply allow; None if that changes nothing.

    A leaver's slot gets free only after its replacement has come, so replacements take from what is offered, too. Where
    that is not enough, the job gets smaller, and where it would get too small, leavers stay.
    """
    offered = seen.supply.offered
    low = max(seen.min_ranks, 1)
    leavers = tuple(rank for rank in leavers if rank < seen.ranks)
    supplied = seen.ranks - len(leavers) + offered
    ranks = min(max(wanted, low), seen.max_ranks)
    limit = f"min {low}" if ranks > wanted else f"max {seen.max_ranks}"
    if ranks > supplied:
        ranks = max(supplied, min(low, seen.ranks + offered))
        limit = f"{offered} more can be had" + (f" ({seen.supply.why})" if seen.supply.why else "")
    leavers = leavers[: max(0, seen.ranks + offered - ranks)]
    if ranks < low or (ranks == seen.ranks and not leavers):
        return None
    return Resize(ranks, leavers, reason if ranks == wanted else f"{reason}; {ranks} instead of {wanted}: {limit}")


def give_back(seen: Observation) -> Resize | None:
    """Return the resize that gives back what the broker revokes, down to the least number of ranks; None if none goes.

    Which ranks sit in the slots concerned is for the caller to add.
    """
    revoked = len(seen.supply.revoked)
    ranks = min(max(seen.ranks - revoked, seen.min_ranks, 1), seen.max_ranks)
    if not revoked or ranks >= seen.ranks:
        return None
    why = f": {seen.supply.why}" if seen.supply.why else ""
    return Resize(ranks, (), f"the broker takes back {revoked} slot{'s' if revoked > 1 else ''}{why}")


@dataclass(frozen=True)
class Manual(Stepless):
    """Does what people ask for."""

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize asked for, or None."""
        if (back := give_back(seen)) is not None or seen.asked is None:
            return back
        return bounded(seen, seen.asked, f"asked for: {seen.asked}")


@dataclass(frozen=True)
class Fixed(Stepless):
    """Keeps a number of ranks, as soon as they can be had."""

    ranks: int

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize to the fixed number, or None."""
        return give_back(seen) or bounded(seen, self.ranks, f"{self.ranks} ranks are wanted")


@dataclass(frozen=True)
class Eager(Stepless):
    """Takes what is offered, and gives back what is taken back."""

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize to all that can be had, or None."""
        if (back := give_back(seen)) is not None or not seen.supply.offered:
            return back
        return bounded(seen, min(seen.ranks + seen.supply.offered, seen.max_ranks), seen.supply.why or "there is room")


@dataclass(frozen=True)
class Entry:
    """From `step` on there are `ranks` ranks; `leavers` are among those that leave for it."""

    step: int
    ranks: int
    leavers: tuple[int, ...] = ()

    def __str__(self) -> str:
        leavers = "-" + "+".join(map(str, self.leavers)) if self.leavers else ""
        return f"{self.step}:{self.ranks}{leavers}"

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Return the entry that `text` writes, such as ``"40:2-0"``; `ConfigError` if it can't be read."""
        match = ENTRY.fullmatch(text)
        if match is None:
            raise ConfigError(f"timetable: {text!r} is not STEP:RANKS or STEP:RANKS-LEAVERS, as in {EXAMPLE}")
        leavers = match["leavers"].split("+") if match["leavers"] else ()
        return cls(int(match["step"]), int(match["ranks"]), tuple(map(int, leavers)))


@dataclass(frozen=True)
class Timetable:
    """Sizes by step. An entry is decided once, in its order, when its step has come and the one before is done.

    Raises
    ------
    ConfigError
        If there is no entry, the steps don't increase, an entry asks for no ranks, or it names a leaver twice.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.entries:
            raise ConfigError(f"timetable: no entries; write some, as in {EXAMPLE}")
        for entry in self.entries:
            if entry.ranks < 1:
                raise ConfigError(
                    f"timetable: '{entry}' asks for {entry.ranks} ranks; a job has at least 1, as in {EXAMPLE}"
                )
            if len(set(entry.leavers)) < len(entry.leavers):
                raise ConfigError(f"timetable: '{entry}' names a leaver twice; name each once, as in {EXAMPLE}")
        for before, after in itertools.pairwise(self.entries):
            if after.step <= before.step:
                raise ConfigError(f"timetable: '{after}' stands after '{before}'; steps must increase, as in {EXAMPLE}")

    @classmethod
    def parse(cls, text: str) -> Timetable:
        """Return the timetable that `text` writes, such as ``"20:3,40:2-0,60:3-1+2"``; `ConfigError` if it is none."""
        return cls(tuple(Entry.parse(part.strip(" ")) for part in text.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.entries))

    def decide(self, seen: Observation) -> Resize | None:
        """Return the next entry's resize if it is due, or None."""
        if (back := give_back(seen)) is not None or seen.decided >= len(self.entries):
            return back
        entry = self.entries[seen.decided]
        if seen.step < entry.step:
            return None
        reason = f"timetable: {entry}"
        nothing = f"{reason} changes nothing: {seen.ranks} ranks, {seen.supply.offered} more can be had"
        # An entry that changes nothing is decided all the same, and refused: the next one must get its turn.
        return bounded(seen, entry.ranks, reason, entry.leavers) or Resize(seen.ranks, (), nothing)

    def next_step(self, step: int, decided: int) -> float:
        """Return the step of the next entry, `step` if that has come already; infinity after the last."""
        return max(step, self.entries[decided].step) if decided < len(self.entries) else math.inf


def check(ranks: int, *, leavers: Collection[int], now: int, minimum: int, maximum: int) -> None:
    """Raise `ResizeRefused`, with the reason, if `now` ranks can't become `ranks`."""
    if ranks < 1:
        raise ResizeRefused(f"{ranks} ranks asked for: a job has at least 1; to end it, use `hpc-elastic stop`")
    if ranks < minimum:
        raise ResizeRefused(f"{ranks} ranks asked for, but min = {minimum}")
    if ranks > maximum:
        raise ResizeRefused(
            f"{ranks} ranks asked for, but max = {maximum}; where it is not set, slots or microbatches limit it"
        )
    for rank in leavers:
        if not 0 <= rank < now:
            there = f"there are only ranks 0 to {now - 1}" if now > 1 else "there is only rank 0"
            raise ResizeRefused(f"rank {rank} should leave, but {there}")
    if len(set(leavers)) < len(leavers):
        raise ResizeRefused(f"{len(leavers)} leavers are named, but one of them twice: {', '.join(map(str, leavers))}")
    if ranks == now and not leavers:
        raise ResizeRefused(f"already at {now} rank{'s' if now > 1 else ''}")


def leaving(size: int, resize: Resize) -> tuple[int, ...]:
    """Return the ranks that leave: those named, and the highest others as far as more have to go."""
    named = set(resize.leavers)
    others = [rank for rank in range(size - 1, -1, -1) if rank not in named]
    more = max(0, size - len(named) - resize.ranks)
    return tuple(sorted(named | set(others[:more])))


def newcomers(size: int, resize: Resize) -> int:
    """Return how many newcomers a resize needs."""
    return resize.ranks - (size - len(leaving(size, resize)))
