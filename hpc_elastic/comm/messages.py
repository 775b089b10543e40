"""What the leader and a newcomer say to each other: files in the run directory at first, then messages on their line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from mpi4py import MPI

from ..model import LOCALHOST, OWN, Member
from ..rundir import RunDirectory

TO_NEWCOMER, WAKE_TAG, CHAIN_TAG, BRIDGE_TAG = 11, 12, 13, 14
MOVE_TAG, GREETING_TAG, PART_TAG, FILL_TAG, MEET_TAG = 20, 21, 22, 23, 24
THERE = 0  # rank of the other side, in the intercommunicator between the leader and a newcomer
LEADER, NEWCOMER = 0, 1  # ranks in the pair that the two form when the party is gathered


def options_file(run: RunDirectory, member: int) -> Path:
    """Return where the leader writes what newcomer `member` must know."""
    return run.newcomers / f"{member}.json"


def report_file(run: RunDirectory, member: int) -> Path:
    """Return where newcomer `member` writes its report."""
    return run.newcomers / f"{member}.report.json"


def order_file(run: RunDirectory, member: int) -> Path:
    """Return where the leader tells newcomer `member` to go on to the next loop."""
    return run.newcomers / f"{member}.order.json"


def port_file(run: RunDirectory, member: int) -> Path:
    """Return where the leader writes under which name of MPI's newcomer `member`, with a launcher of its own, reaches it."""
    return run.newcomers / f"{member}.port"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer must know before it runs the user's script."""

    member: int
    slot: int
    companion: int = OWN
    host: str = LOCALHOST
    gpus: str = ""
    run_dir: str
    settings: dict[str, object]
    argv: list[str]
    module: str
    path: list[str]
    directory: str
    started: float
    leader: Member
    launcher: list[str] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer says: it is there, it is warm at loop number `loop`, or `error` tells why it can't come.

    `how` it was started: "warm", by a warm parent, or "cold", with the reason if there is one.
    """

    member: Member
    loop: int = 0
    names: list[str] = []
    how: str = ""
    stages: dict[str, float] = {}
    peak_bytes: int = 0
    error: str = ""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader says to a newcomer: ``gather`` with the others of its party, ``enter``, ``skip`` this loop, ``go``."""

    order: str
    index: int = 0
    total: int = 0


@dataclass
class Party:
    """Newcomers that are together with the leader: rank 0 of `group` is the leader, the newcomers follow in order."""

    group: MPI.Intracomm


def extend(group: MPI.Intracomm, peer: MPI.Intracomm, remote: int) -> MPI.Intracomm:
    """Return `group` with one more process; its rank 0 knows it as rank `remote` of `peer`. Frees `group`."""
    inter = group.Create_intercomm(0, peer, remote, CHAIN_TAG)
    merged = inter.Merge(high=False)
    inter.Free()
    group.Free()
    return merged
