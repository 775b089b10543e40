"""Frozen values that the other modules pass around."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import msgspec

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return `metrics` as they were before they went through JSON, which writes null for NaN and infinity."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def whole(name: str, value: object) -> int:
    """Return `value` as an integer of Python's, not NumPy's, which the status and the events can't hold.

    Raises
    ------
    ConfigError
        If it is none; `name` is how the message calls it.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} must be an integer, not {value!r:.100}") from None


LOCALHOST = "localhost"  # where the leader is
OWN = -1  # instead of a companion's number: the job's own allocation


class Member(msgspec.Struct, frozen=True):
    """One rank's process, under a number that it keeps for its whole life.

    Attributes
    ----------
    id : int
        Ordinal of the process in the job, never reused: the seed ranks come first, newcomers in the order of their start.
    pid : int
        Process id on its host.
    host : str
        Host name.
    slot : int
        Number of the broker's slot that it occupies.
    parks : bool
        True if the process can't be ended singly (it shares its MPI world) and is put to sleep instead when it leaves.
    """

    id: int
    pid: int
    host: str
    slot: int = -1
    parks: bool = False


class Generation(msgspec.Struct, frozen=True):
    """The membership between two resizes; ``members[r]`` is the process with rank ``r``."""

    number: int
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.members)


class Cursor(msgspec.Struct, frozen=True):
    """State of the data: what has been consumed so far.

    Attributes
    ----------
    epoch : int
        Current epoch, from 0.
    position : int
        Samples of this epoch already consumed.
    step : int
        Steps done since the start of the loop, over all epochs.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0


class Lease(msgspec.Struct, frozen=True):
    """The right to run one rank in one slot of the broker's.

    Attributes
    ----------
    slot : int
        Number of the slot.
    host : str
        Where it is.
    companion : int
        Number of the companion, another allocation with an agent that starts processes there, or `OWN`.
    gpus : str
        GPUs of the rank, as ``CUDA_VISIBLE_DEVICES`` names them; empty leaves that variable alone.
    """

    slot: int
    host: str = LOCALHOST
    companion: int = OWN
    gpus: str = ""


class Supply(msgspec.Struct, frozen=True):
    """What the broker sees when polled.

    Attributes
    ----------
    offered : int
        Slots that could be leased now, on top of those held.
    leases : tuple of Lease
        Leases held.
    revoked : tuple of Lease
        Leases held that must be given back.
    why : str
        What limits the offer, for people ("2 cores, 2 in use").
    pending : int
        Slots asked for on which there is no word yet.
    refused : str
        Why the last request was not granted in full; empty if it was, or there is no word yet.
    """

    offered: int
    leases: tuple[Lease, ...] = ()
    revoked: tuple[Lease, ...] = ()
    why: str = ""
    pending: int = 0
    refused: str = ""


class Resize(msgspec.Struct, frozen=True):
    """A decision to change the number of ranks.

    Attributes
    ----------
    ranks : int
        Number of ranks wanted.
    leavers : tuple of int
        Ranks (of the generation in which it was decided) that must be among those leaving. Where more have to go, the
        highest ranks do. With as many ranks wanted as before, leavers are replaced.
    reason : str
        Why, for people.
    """

    ranks: int
    leavers: tuple[int, ...] = ()
    reason: str = ""


class Request(msgspec.Struct, frozen=True):
    """What was asked for through the run directory's inbox: ``kind`` is "resize", "checkpoint", "leave" or "stop".

    ``ranks`` is the number wanted; for "leave" it is the number of the process that has to go.
    """

    kind: str
    ranks: int = 0


class Observation(msgspec.Struct, frozen=True):
    """All that a policy may look at.

    Attributes
    ----------
    step : int
        Steps done.
    time_s : float
        Seconds since the run began.
    ranks, min_ranks, max_ranks : int
        Members now, and the limits of the configuration.
    supply : Supply
        What the broker said last.
    decided : int
        Number of this policy's decisions that were carried out or refused so far.
    asked : int or None
        Number of ranks a person asked for and that is not yet served.
    """

    step: int
    time_s: float
    ranks: int
    min_ranks: int
    max_ranks: int
    supply: Supply
    decided: int = 0
    asked: int | None = None


class Move(msgspec.Struct, frozen=True):
    """A run of rows of a distributed array that goes from one owner to another; ``[start, stop)`` are global rows."""

    source: int
    target: int
    start: int
    stop: int
