"""What happened in a run, one JSON object a line in ``events.jsonl``.

Written by the leader alone, and between two attempts, when there is none, by the supervisor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Mapping  # msgspec needs it
from typing import TYPE_CHECKING, Any

import msgspec

from .errors import RunDirectoryError
from .model import numbers

if TYPE_CHECKING:
    from pathlib import Path


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """Base of all events; ``time`` is in seconds since the Unix epoch."""

    time: float = msgspec.field(default_factory=time.time)


class Started(Event, frozen=True, kw_only=True):
    """The run began with these ranks, or an attempt at it did: a run that was started again has several."""

    script: str
    mpi: str
    hosts: tuple[str, ...]
    ranks: int
    settings: dict[str, Any] = {}


class Decided(Event, frozen=True, kw_only=True):
    """A resize was decided on, and why."""

    step: int
    before: int
    after: int
    reason: str


class Refused(Event, frozen=True, kw_only=True):
    """A resize was refused or given up, and why."""

    step: int
    ranks: int
    reason: str


class Notice(Event, frozen=True, kw_only=True):
    """Something that people should know."""

    text: str


class Ready(Event, frozen=True, kw_only=True):
    """A newcomer is warm and waits to be merged; ``stages`` are its own seconds by stage.

    ``how`` it came: "warm", forked by a warm parent; "cold", with the reason if a warm parent was there; or "parked".
    """

    member: int
    host: str
    how: str = ""
    stages: dict[str, float]


class Resized(Event, frozen=True, kw_only=True):
    """A resize was committed. Times are in seconds.

    ``stages`` holds what the new leader stood still for, by stage, and ``standstill_s`` their sum. It takes part in every
    stage, and the others wait for it.
    """

    generation: int
    step: int
    epoch: int
    before: int
    after: int
    joined: tuple[int, ...]
    left: tuple[int, ...]
    reason: str
    stages: dict[str, float]
    standstill_s: float
    wait_s: float = 0.0
    state_bytes: int = 0
    moved_bytes: int = 0


class Lost(Event, frozen=True, kw_only=True):
    """Ranks were lost, and the others go on without them.

    ``generation`` is that of the survivors, ``step`` where it begins, ``lost_steps`` how many steps are done once more.
    ``members`` are the ids of those lost, and ``how`` says what became of them. ``seconds`` holds what recovery took by
    stage, and ``recovery_s`` the sum.
    """

    step: int
    generation: int
    members: tuple[int, ...]
    how: str
    before: int
    after: int
    lost_steps: int
    seconds: dict[str, float]
    recovery_s: float


class Checkpointed(Event, frozen=True, kw_only=True):
    """A checkpoint was written, or with an ``error`` could not be.

    ``step`` is the number of steps of loop ``loop`` done in it; loops count from 1. Of the ``seconds``, ranks stood still
    for ``standstill_s``.
    """

    loop: int
    step: int
    path: str
    seconds: float
    bytes: int
    standstill_s: float
    error: str = ""


class Resumed(Event, frozen=True, kw_only=True):
    """An attempt goes on where the checkpoint ``path`` was taken."""

    loop: int
    step: int
    path: str
    ranks: int


class Rewound(Event, frozen=True, kw_only=True):
    """After a loss the ranks that are left began again at ``step`` of loop ``loop``, where they had been at ``before``.

    What they began with came from ``source``: "memory", a checkpoint's path, or "the start". It took ``seconds``.
    """

    loop: int
    step: int
    before: int
    source: str
    seconds: float
    ranks: int


class Restarted(Event, frozen=True, kw_only=True):
    """The supervisor starts the job again: as attempt number ``attempt``, after a failure at ``step``, -1 if it did none."""

    attempt: int
    step: int
    reason: str
    wait_s: float


class Measured(Event, frozen=True, kw_only=True):
    """The means of the ``metrics`` over the ``samples`` since the last such event, up to 256 times a loop.

    ``step`` is the number of steps of loop ``loop`` done so far; the steps at which this is said don't depend on the ranks.
    ``samples`` is 0 for what the script gave to `Job.log`.
    """

    loop: int
    epoch: int
    step: int
    samples: int
    ranks: int
    metrics: Mapping[str, float | None]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "metrics", numbers(self.metrics))


class Epoch(Event, frozen=True, kw_only=True):
    """An epoch ended."""

    epoch: int
    step: int
    ranks: int
    samples: int
    seconds: float
    metrics: Mapping[str, float | None]

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "metrics", numbers(self.metrics))


class Failed(Event, frozen=True, kw_only=True):
    """The job failed; ``error`` is what every rank raises."""

    error: str
    rank: int
    host: str
    generation: int
    step: int


class Ended(Event, frozen=True, kw_only=True):
    """The job ended well; ``stopped`` if that was asked for."""

    steps: int
    seconds: float
    ranks: int
    stopped: bool = False


AnyEvent = (
    Started
    | Decided
    | Refused
    | Notice
    | Ready
    | Resized
    | Lost
    | Checkpointed
    | Resumed
    | Rewound
    | Restarted
    | Measured
    | Epoch
    | Failed
    | Ended
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyEvent)


class EventLog:
    """Appends events to a file. One line is one write, so that a reader never sees half of one on a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: Event) -> None:
        """Append `event`, all of it or nothing."""
        line = _encoder.encode(event) + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, os.lseek(descriptor, 0, os.SEEK_CUR) - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        finally:
            os.close(descriptor)

    def mend(self) -> None:
        """Cut off half a line at the end, which the next event would continue: the disk was full or its writer killed."""
        with contextlib.suppress(FileNotFoundError):
            whole = self._path.read_bytes().rfind(b"\n") + 1
            if whole < self._path.stat().st_size:
                os.truncate(self._path, whole)


class Reader:
    """Reads the events in the file `path`, each once, as they are written."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._lines = path, 0, 0

    def read(self) -> list[AnyEvent]:
        """Return the events that are new; a last line still being written is left out, a missing file is empty.

        Raises
        ------
        RunDirectoryError
            If a line is not an event.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data.split(b"\n")[:-1]
        found = [_decoded(self._path, number, line) for number, line in enumerate(lines, self._lines + 1)]
        self._offset += data.rfind(b"\n") + 1
        self._lines += len(lines)
        return found


def read(path: Path) -> list[AnyEvent]:
    """Return the events in the file `path`, as `Reader` does."""
    return Reader(path).read()


def _decoded(path: Path, number: int, line: bytes) -> AnyEvent:
    try:
        event: AnyEvent = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged, line {number} is not an event: {error}; remove that line, the others stay readable"
        ) from error
    return event
