"""The companions of a run from outside: what becomes of them, for people, and their end when the run is over."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from ...errors import SlurmError
from .commands import Commands
from .companions import Companion, Files

AGENTS_S = 1.0  # how long agents may take to end their companions; Slurm may soon kill who waits for that
LOOK_S = 0.02


def found(run_path: Path) -> list[dict[str, Any]]:
    """Return the companions of the run in `run_path` that have not ended: none if it has no broker for Slurm."""
    if not (run_path / "companions").is_dir():
        return []
    return [_told(companion) for companion in Files(run_path).read().values() if companion.end is None]


def _told(companion: Companion) -> dict[str, Any]:
    held = companion.held
    return {
        "companion": companion.number,
        "job": companion.asked.allocation or None,
        "node": held.node if held else None,
        "ranks": companion.asked.ranks,
        "state": _state(companion),
        "since": held.time if held else companion.asked.time,
        "end": companion.asked.end_s or None,
    }


def _state(companion: Companion) -> str:
    if companion.released:
        return "given back"
    if companion.told:
        return "told by Slurm to go"
    return "held" if companion.held else "asked for"


def lines(companions: list[dict[str, Any]]) -> list[str]:
    """Return what `found` returned, a line each."""
    return [_line(each) for each in companions]


def _line(each: dict[str, Any]) -> str:
    where = each["node"] or "no node yet"
    job = f"job {each['job']}" if each["job"] else "not submitted yet"
    slots = f"{each['ranks']} rank{'s' if each['ranks'] != 1 else ''}"
    since = time.strftime("%H:%M:%S", time.localtime(each["since"]))
    end = f", ends {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(each['end']))} at the latest" if each["end"] else ""
    return f"companion {each['companion']}: {where}, {job}, for {slots}, {each['state']} since {since}{end}"


def end(run_path: Path) -> None:
    """End the companions of a run that is over: by their agents, and by Slurm where there is none any more."""
    if not (run_path / "companions").is_dir():
        return
    files = Files(run_path)

    def left() -> list[Companion]:
        return [companion for companion in files.read().values() if companion.end is None]

    for companion in left():
        files.release(companion.number)
    deadline = time.monotonic() + AGENTS_S
    while left() and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    slurm = Commands()
    with contextlib.suppress(SlurmError):
        slurm.cancel(companion.asked.allocation for companion in left() if companion.asked.allocation)
    # A salloc that is killed may have been granted what it told nobody.
    unheard = {files.name(companion.number) for companion in files.read().values() if not companion.asked.allocation}
    if unheard:
        with contextlib.suppress(SlurmError):
            slurm.cancel(job.id for job in slurm.snapshot().live(unheard))
