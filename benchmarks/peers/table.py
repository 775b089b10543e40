"""What the runs of a system come to, as records."""

from __future__ import annotations

from typing import Any

from ..record import Record, record
from .systems import System

SAMPLES = ("repeated", "lost", "in_vain")


def records(system: type[System], runs: list[dict[str, Any]]) -> list[Record]:
    """Return the records of `runs`; each says how many of them came so far."""
    context: dict[str, Any] = {"system": system.name, "runs": len(runs)}
    found = []
    for what in ("added", "removed", "killed"):
        changes = [change for run in runs for change in run[what]]
        own = {**context, "change": what}
        if changes:
            found.append(record("standstill_s", [change["standstill_s"] for change in changes], "s", own))
        if changes and what != "removed":
            found.append(record("until_s", [change["until_s"] for change in changes], "s", own))
    ended = [run for run in runs if "accuracy" in run]
    if ended:
        found += [record(name, [run[name] for run in ended], "samples", context) for name in SAMPLES]
        found.append(record("accuracy", [run["accuracy"] for run in ended], "", context, better="higher"))
    troubles = [trouble for run in runs for trouble in run["troubles"]]
    more = {**context, "troubles": troubles, "settings": system.settings}
    found.append(record("ended_well", [float(not run["troubles"]) for run in runs], "", more, better="higher"))
    return found
