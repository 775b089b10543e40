"""Notices that all ranks wait for each other, though all live: a host has lost its network, or a message was lost.

Each rank that has waited for long says so in a file, and which hosts don't answer it any more. When all have, nobody will
ever go on. If the network has fallen apart, the largest part goes on without the others, by the same rule on every rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from ..comm.reach import Reach
from ..model import Member
from ..rundir import RunDirectory

FRESH_S = 5.0  # how long a rank's word counts; it repeats it every `LOOK_S` seconds
LOOK_S = 0.5


class Word(msgspec.Struct, frozen=True):
    """What a rank says that waits: a number that changes each time, and the hosts that don't answer it any more."""

    count: int
    cut_off: tuple[str, ...] = ()


def severed(members: Sequence[Member], cut_off: Mapping[int, Collection[str]]) -> frozenset[int]:
    """Return the members that the others have to go on without.

    Parameters
    ----------
    members : sequence of Member
        All, in the order of their ranks.
    cut_off : mapping of int to collection of str
        Hosts that members can't reach any more.

    Returns
    -------
    frozenset of int
        Numbers of the members outside the largest part of the network; of equal ones, the first rank's counts.
    """
    apart = {frozenset((member.host, host)) for member in members for host in cut_off.get(member.id, ())}
    parts: list[set[str]] = []
    left = list(dict.fromkeys(member.host for member in members))
    while left:
        part, edge = {left[0]}, [left.pop(0)]
        while edge:
            here = edge.pop()
            found = [host for host in left if frozenset((here, host)) not in apart]
            left = [host for host in left if host not in found]
            part |= set(found)
            edge += found
        parts.append(part)
    largest = max(parts, key=lambda part: sum(member.host in part for member in members))
    return frozenset(member.id for member in members if member.host not in largest)


class Standstill:
    """One rank's part in it.

    Parameters
    ----------
    run : RunDirectory
        Where the ranks tell each other.
    me : Member
        This process.
    stall_s : float
        Seconds after which a wait is long.
    limit_s : float
        Seconds after which a standstill of all ranks whose cause is not found ends them.
    reach : Reach
        Asks other hosts; it has learned which answer.
    """

    def __init__(self, run: RunDirectory, me: Member, stall_s: float, limit_s: float, reach: Reach) -> None:
        self._run = run
        self._me = me
        self._stall_s = stall_s
        self._limit_s = limit_s
        self._reach = reach
        self._count = 0
        self._heard: dict[int, tuple[int, float]] = {}  # member -> count of its last word, and when that was seen

    def look(self, members: Sequence[Member], waited_s: float) -> str:
        """Return why this rank can't go on, or an empty string. This rank has been waiting for `waited_s` seconds."""
        if waited_s < self._stall_s:
            self._fall_silent()
            return ""
        self._count += 1
        others = {member.host for member in members} - {self._me.host}
        self._say(Word(self._count, tuple(sorted(self._reach.cut_off(others)))))
        words = self._words(members)
        if len(words) < len(members):
            return ""
        lost = severed(members, {number: word.cut_off for number, word in words.items()})
        if self._me.id not in lost:
            for number in lost:
                self._run.condemn(number)
        if not lost and waited_s > self._limit_s:
            return f"all ranks live, and have waited for each other for {waited_s:.0f} s"
        return ""

    def _file(self, number: int) -> Path:
        return self._run.path / "ranks" / f"{number}.waits"

    def _say(self, word: Word) -> None:
        file = self._file(self._me.id)
        with contextlib.suppress(OSError):
            file.touch(mode=0o600)
            # In place: over NFS a reader sees another content of a file sooner than another file of that name.
            file.write_bytes(msgspec.json.encode(word))

    def _fall_silent(self) -> None:
        if self._count:
            self._count = 0
            self._heard.clear()
            with contextlib.suppress(OSError):
                self._file(self._me.id).unlink()

    def _words(self, members: Sequence[Member]) -> dict[int, Word]:
        """Return the words of those who say that they wait."""
        now, found = time.monotonic(), {}
        for member in members:
            try:
                word = msgspec.json.decode(self._file(member.id).read_bytes(), type=Word)
            except (OSError, msgspec.MsgspecError):
                continue
            if self._heard.get(member.id, (0, 0.0))[0] != word.count:
                self._heard[member.id] = word.count, now
            if now - self._heard[member.id][1] < FRESH_S:
                found[member.id] = word
        return found
