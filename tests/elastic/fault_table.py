"""The table of faults: written in the end by the process that gathers all reports, whichever worker ran the tests."""

from __future__ import annotations

import re
from pathlib import Path

from hpc_elastic.comm.vendor import find_mpiexec

PROPERTY = "fault"
ACTIONS = ("kill", "stop", "delay")


def gathered(reports) -> dict[tuple[str, ...], str]:
    """Return what happened, by job, stage, role and action, from the reports of the tests."""
    found = {}
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        if PROPERTY in properties and report.when == "call":
            *key, came = properties[PROPERTY]
            found[tuple(key)] = came if report.passed else f"FAILED ({came})"
    return found


def write(file: Path, found: dict[tuple[str, ...], str], order: list[tuple[str, ...]]) -> None:
    """Write what was `found` into the section of this MPI in the Markdown file `file`."""
    title = f"## {find_mpiexec()[1].title}"
    rows = [
        f"| {stage} | {role}{'' if job == 'softmax' else ', array'} | "
        + " | ".join(found.get((job, stage, role, action), "not tested") for action in ACTIONS)
        + " |"
        for job, stage, role in dict.fromkeys(order)
    ]
    section = "\n".join([title, "", f"| stage | role | {' | '.join(ACTIONS)} |", "|---|---|---|---|---|", *rows, ""])
    text = file.read_text() if file.exists() else "# Faults\n"
    before, *others = re.split(r"\n(?=## )", text.rstrip("\n") + "\n")
    kept = [other for other in others if not other.startswith(title + "\n")]
    file.write_text("\n".join([before, *sorted([*kept, section])]))
