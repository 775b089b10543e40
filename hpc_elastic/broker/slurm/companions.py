"""Companions, as the run directory tells of them: asked for, held, told to go, given back, ended.

A companion is another, small allocation of the same user, whose batch script is `hpc_elastic/agent.py`. All that is known of
one stands in files, so that a leader that comes after another, or after a restart, finds it there. It is written down before
Slurm is asked: an allocation of which nothing is written can't be.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A companion that was asked for: for how many ranks, and when (seconds since the epoch).

    `allocation` is Slurm's number of it, and `end_s` when it ends at the latest, once that is known.
    """

    ranks: int
    time: float
    allocation: int = 0
    end_s: float = 0.0


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What a companion's agent says of itself: see `hpc_elastic.agent`."""

    host: str
    node: str
    allocation: str
    gpus: str
    pid: int
    time: float


@dataclass(frozen=True)
class Companion:
    """One companion, as it was when the files were read.

    Attributes
    ----------
    number : int
        Its number in the run; never used again.
    asked : Asked
        What was asked for.
    held : Held or None
        What its agent says, once it runs.
    beat : float
        Time of its agent's last sign of life.
    told : bool
        True if Slurm has told it to go.
    released : bool
        True if the job has given it back.
    end : str or None
        Why its agent ended it; None as long as it has not.
    ended_s : float
        When that was, in seconds since 1970.
    """

    number: int
    asked: Asked
    held: Held | None = None
    beat: float = 0.0
    told: bool = False
    released: bool = False
    end: str | None = None
    ended_s: float = 0.0

    def seconds(self, now_s: float) -> float:
        """Return for how long it has been held."""
        return max(0.0, (self.ended_s or now_s) - self.held.time) if self.held is not None else 0.0

    @property
    def slots(self) -> tuple[int, ...]:
        """The numbers of its slots."""
        first = (self.number + 1) * MOST_RANKS
        return tuple(range(first, first + self.asked.ranks))


MARK = "hpc_elastic "  # with what the comments of companions begin, this job's and others'
SILENT_S = 20.0  # an agent gives a sign of life four times a second; a shared file system may be late with it
MOST_RANKS = 1024  # a companion's, so that each has slots of its own


def companion_of(slot: int) -> int:
    """Return the number of the companion that a slot belongs to, or `OWN`."""
    return slot // MOST_RANKS - 1


class Silences:
    """Finds companions whose agent is gone: nobody else would end them.

    Only changes of a sign of life count, by the clock here, and only while this process looks often enough itself.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # companion -> its last sign, and when that was seen
        self._looked = 0.0
        self._told: set[int] = set()

    def new(self, companions: Mapping[int, Companion], now: float) -> list[int]:
        """Return those that have fallen silent since the last call, at `now` of a monotonic clock in seconds."""
        paused, self._looked = now - self._looked > SILENT_S / 4, now
        found = []
        for number, companion in companions.items():
            if companion.held is None or companion.end is not None or number in self._told:
                continue
            beat, since = self._seen.get(number, (-1.0, now))
            if paused or companion.beat != beat:
                self._seen[number] = companion.beat, now
            elif now - since > SILENT_S:
                self._told.add(number)
                found.append(number)
        return found


class Files:
    """The companions' files of a run.

    Parameters
    ----------
    run_path : Path
        The run directory.
    """

    def __init__(self, run_path: Path) -> None:
        self.folder = run_path / "companions"
        self._known: dict[int, Companion] = {}
        self._hash = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16]
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def name(self, number: int) -> str:
        """Return the comment by which Slurm's job is known as companion `number` of this run."""
        return f"{MARK}{self._hash} {number}"

    def path(self, number: int, kind: str) -> Path:
        """Return the path of one of a companion's files."""
        return self.folder / f"{number}.{kind}"

    def read(self) -> dict[int, Companion]:
        """Return all companions by their numbers, ended ones too. What does not change is read once."""
        kinds: dict[int, set[str]] = {}
        for entry in os.scandir(self.folder):
            stem, _, kind = entry.name.partition(".")
            if stem.isdecimal() and kind:
                kinds.setdefault(int(stem), set()).add(kind)
        for number, there in sorted(kinds.items()):
            if "asked.json" in there:
                self._known[number] = self._read(number, there)
        return dict(self._known)

    def _read(self, number: int, there: set[str]) -> Companion:
        before = self._known.get(number)
        if before is not None and before.end is not None:
            return before
        asked = before.asked if before is not None and before.asked.allocation else self._get(number, "asked.json", Asked)
        if not asked.allocation and "job" in there:
            asked = msgspec.structs.replace(asked, allocation=int(self.path(number, "job").read_text()))
        held = before.held if before is not None else None
        if held is None and "held.json" in there:
            held = self._get(number, "held.json", Held)
        beat = self.path(number, "beat").stat().st_mtime if "beat" in there else 0.0
        end, ended_s = None, 0.0
        if "end" in there:
            end, ended_s = self.path(number, "end").read_text(errors="replace"), self.path(number, "end").stat().st_mtime
        return Companion(number, asked, held, beat, "term" in there, "release" in there, end, ended_s)

    def _get(self, number: int, kind: str, struct: type[T]) -> T:
        return msgspec.json.decode(self.path(number, kind).read_bytes(), type=struct)

    def ask(self, number: int, asked: Asked) -> None:
        """Write down that a companion is asked for, or Slurm's number of it."""
        self.put(self.path(number, "asked.json"), msgspec.json.encode(asked))
        (self.folder / str(number)).mkdir(mode=0o700, exist_ok=True)

    def limit(self, companion: Companion, end_s: float) -> None:
        """Write down when a companion ends at the latest, for people."""
        asked = msgspec.structs.replace(companion.asked, end_s=end_s)
        self._known[companion.number] = replace(companion, asked=asked)
        self.ask(companion.number, asked)

    def release(self, number: int) -> None:
        """Let a companion's agent end it."""
        self.path(number, "release").touch(mode=0o600)

    def end(self, number: int, why: str) -> None:
        """Write down that a companion has ended, where its agent can't: it never ran, or is gone."""
        self.put(self.path(number, "end"), why.encode())

    @staticmethod
    def put(path: Path, content: bytes) -> None:
        """Write a file so that it is there whole, or not at all."""
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        beside.rename(path)
