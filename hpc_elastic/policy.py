"""Policies: how many ranks to have, as a pure function of what is seen; and what a resize means for the ranks there are."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass

from .errors import ConfigError, ResizeRefused
from .model import Observation, Resize

ENTRY = re.compile(r"(?P<step>\d+):(?P<ranks>\d+)(?:-(?P<leavers>\d+(?:\+\d+)*))?")
EXAMPLE = '"20:3,40:2-0" (3 ranks from step 20 on, 2 from step 40 on, rank 0 leaving)'


def bounded(seen: Observation, wanted: int, reason: str, leavers: tuple[int, ...] = ()) -> Resize | None:
    """Return the resize to `wanted` ranks, as far as limits and supply allow; None if that changes nothing."""
    ranks = min(max(wanted, seen.min_ranks), seen.max_ranks, seen.ranks + seen.supply.offered)
    ranks = max(ranks, 1)
    leavers = tuple(rank for rank in leavers if rank < seen.ranks)
    if ranks == seen.ranks and not leavers:
        return None
    if ranks != wanted:
        reason += f"; {ranks} instead of {wanted}: {seen.supply.why or 'limited by min and max'}"
    return Resize(ranks, leavers, reason)


def give_back(seen: Observation) -> Resize | None:
    """Return the resize that gives back what the broker revokes, or None."""
    revoked = len(seen.supply.revoked)
    ranks = max(seen.ranks - revoked, 1)
    if not revoked or ranks == seen.ranks:
        return None
    return Resize(ranks, (), f"the broker takes back {revoked} slot{'s' if revoked > 1 else ''}: {seen.supply.why}")


@dataclass(frozen=True)
class Manual:
    """Does what people ask for."""

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize asked for, or None."""
        if (back := give_back(seen)) is not None or seen.asked is None:
            return back
        return bounded(seen, seen.asked, f"{seen.asked} ranks were asked for")


@dataclass(frozen=True)
class Fixed:
    """Keeps a number of ranks, as soon as they can be had."""

    ranks: int

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize to the fixed number, or None."""
        return give_back(seen) or bounded(seen, self.ranks, f"{self.ranks} ranks are wanted")


@dataclass(frozen=True)
class Entry:
    """From `step` on there are `ranks` ranks; `leavers` are among those that leave for it."""

    step: int
    ranks: int
    leavers: tuple[int, ...] = ()

    def __str__(self) -> str:
        leavers = "-" + "+".join(map(str, self.leavers)) if self.leavers else ""
        return f"{self.step}:{self.ranks}{leavers}"


@dataclass(frozen=True)
class Timetable:
    """Sizes by step. An entry is decided once, in its order, when its step has come and the one before is done."""

    entries: tuple[Entry, ...]

    @classmethod
    def parse(cls, text: str) -> Timetable:
        """Return the timetable that `text` writes, such as ``"20:3,40:2-0,60:3-1+2"``.

        Raises
        ------
        ConfigError
            If an entry can't be read, its steps don't increase, or it asks for no ranks.
        """
        entries = []
        for part in text.replace(" ", "").split(","):
            match = ENTRY.fullmatch(part)
            if match is None:
                raise ConfigError(f"timetable: {part!r} is not STEP:RANKS or STEP:RANKS-LEAVERS, as in {EXAMPLE}")
            leavers = tuple(int(rank) for rank in match["leavers"].split("+")) if match["leavers"] else ()
            entries.append(Entry(int(match["step"]), int(match["ranks"]), leavers))
            if entries[-1].ranks < 1:
                raise ConfigError(f"timetable: {part!r} asks for 0 ranks; a job has at least 1")
            if len(set(leavers)) < len(leavers):
                raise ConfigError(f"timetable: {part!r} names a leaver twice")
        for before, after in itertools.pairwise(entries):
            if after.step <= before.step:
                raise ConfigError(f"timetable: step {after.step} comes after step {before.step}; steps must increase")
        return cls(tuple(entries))

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
        # An entry that changes nothing is decided all the same: the next one must get its turn.
        return bounded(seen, entry.ranks, reason, entry.leavers) or Resize(seen.ranks, (), reason)


def check(ranks: int, *, leavers: Collection[int], now: int, minimum: int, maximum: int) -> None:
    """Raise `ResizeRefused`, with the reason, if `now` ranks can't become `ranks`."""
    if ranks < 1:
        raise ResizeRefused(f"{ranks} ranks asked for: a job has at least 1; to end it, use `hpc-elastic stop`")
    if ranks < minimum:
        raise ResizeRefused(f"{ranks} ranks asked for, but min = {minimum}")
    if ranks > maximum:
        raise ResizeRefused(f"{ranks} ranks asked for, but max = {maximum}")
    for rank in leavers:
        if not 0 <= rank < now:
            raise ResizeRefused(f"rank {rank} should leave, but there are only ranks 0 to {now - 1}")
    if ranks == now and not leavers:
        raise ResizeRefused(f"there are {now} ranks already")


def leaving(size: int, resize: Resize) -> tuple[int, ...]:
    """Return the ranks that leave: those named, and the highest others as far as more have to go."""
    named = set(resize.leavers)
    others = [rank for rank in range(size - 1, -1, -1) if rank not in named]
    more = max(0, size - len(named) - resize.ranks)
    return tuple(sorted(named | set(others[:more])))


def newcomers(size: int, resize: Resize) -> int:
    """Return how many newcomers a resize needs."""
    return resize.ranks - (size - len(leaving(size, resize)))
