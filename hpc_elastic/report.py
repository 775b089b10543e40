"""The report: what happened in a run, printed for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text


def table(summary: dict[str, Any]) -> None:
    """Print on stdout what `summary.summarize` returned."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(_header(summary))
    if summary["generations"]:
        console.print(_generation_table(summary["generations"], summary["unit"]))
    if any(row["stages"] for row in summary["generations"]):
        console.print(_stage_table(summary["generations"]))
    if summary["newcomers"]:
        console.print(_newcomer_table(summary["newcomers"]))
    for line in _troubles(summary):
        console.print(line)
    for refusal in summary["refusals"]:
        console.print(f"refused at step {refusal['step']}: {refusal['ranks']} ranks: {refusal['reason']}")
    reasons = tuple(refusal["reason"] for refusal in summary["refusals"])
    for notice in summary["notices"]:
        if not notice["text"].endswith(reasons):
            console.print(f"notice: {notice['text']}")
    if summary["failure"]:
        console.print(f"failed: {summary['failure']['error']}")
        if summary["failure"]["traceback"]:
            console.print(summary["failure"]["traceback"].rstrip())


def _troubles(summary: dict[str, Any]) -> list[str]:
    """Return what was lost, and how the run went on."""
    found = []
    for loss in summary["losses"]:
        who = ", ".join(map(str, loss["members"]))
        redone = (
            f", {loss['lost_steps']} step{'s' if loss['lost_steps'] != 1 else ''} done again" if loss["lost_steps"] else ""
        )
        took = f"{loss['recovery_s'] * 1000:.0f} ms" if loss["recovery_s"] < 1 else f"{loss['recovery_s']:.1f} s"
        stages = ", ".join(f"{stage} {seconds * 1000:.0f}" for stage, seconds in loss["seconds"].items())
        found.append(
            f"lost at step {loss['step']}: process {who}: {loss['how']}: {loss['before']} -> {loss['after']} ranks{redone}, "
            f"recovered in {took}{f' (ms: {stages})' if stages else ''}"
        )
    found += [
        f"rewound from step {rewind['before']} to step {rewind['step']}, from {rewind['source']}, by {rewind['ranks']} "
        f"rank{'s' if rewind['ranks'] != 1 else ''} in {rewind['seconds'] * 1000:.0f} ms"
        for rewind in summary["rewinds"]
    ]
    found += [
        f"restart (attempt {restart['attempt']}) after {_place(restart['step'])}: {restart['reason']}"
        for restart in summary["restarts"]
    ]
    found += [f"checkpoint failed at step {each['step']}: {each['error']}" for each in summary["checkpoints"]["errors"]]
    return found


def _place(step: int) -> str:
    return f"step {step}" if step >= 0 else "no step"


def _header(summary: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    seconds, planned = summary["seconds"], summary["steps_planned"]
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items())
    state = summary["state"] + (f", {summary['under_way']}" if summary["under_way"] else "")
    for name, value in {
        "run": summary["run"],
        "script": summary["script"],
        "MPI": summary["mpi"],
        "hosts": ", ".join(summary["hosts"]),
        "settings": ", ".join(f"{name} = {value}" for name, value in summary["settings"].items()),
        "state": state + (f" after {seconds:.1f} s" if seconds is not None else ""),
        "attempts": str(summary["attempts"]) if summary["attempts"] > 1 else "",
        "steps": f"{summary['steps']}"
        + (f" of {planned}" if planned and planned > summary["steps"] else "")
        + (f", and {summary['steps_lost']} lost" if summary["steps_lost"] else ""),
        "checkpoints": _checkpoints(summary["checkpoints"]),
        "metrics": metrics,
    }.items():
        if value:
            grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return grid


def _checkpoints(found: dict[str, Any]) -> str:
    if not found["count"]:
        return ""
    last = found["last"]
    return (
        f"{found['count']} of {decimal(last['bytes'])} in {found['seconds']:.2f} s each, standstill "
        f"{found['standstill_s'] * 1000:.1f} ms; last: step {last['step']}"
    )


def _columns(*names: str, title: str | None = None) -> Table:
    found = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name in names:
        found.add_column(name, no_wrap=name != "why", overflow="fold")
    return found


def _labels(generations: list[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """Return what names a generation: its number, behind that of the attempt if there are several, each counting anew."""
    several = generations[-1]["attempt"] > 1
    return lambda row: f"{row['attempt']}:{row['number']}" if several else str(row["number"])


def _generation_table(generations: list[dict[str, Any]], unit: str) -> Table:
    known = any(row["samples_per_s"] for row in generations)
    pace, unit = ("samples_per_s", unit) if known else ("steps_per_s", "turns" if unit == "turns" else "steps")
    label = _labels(generations)
    found = _columns("gen", "steps", "ranks", "who", "standstill", "ready in", f"{unit}/s", "why")
    for row in generations:
        who = [f"+{member}" for member in row["joined"]] + [f"-{member}" for member in row["left"]]
        found.add_row(
            label(row),
            f"{row['from_step']}-{row['to_step']}",
            str(row["ranks"]),
            " ".join(who),
            f"{row['standstill_s'] * 1000:.1f} ms" if row["stages"] else "",
            f"{row['wait_s']:.2f} s" if row["stages"] and row["joined"] else "",
            f"{row[pace]:,.0f}" if row[pace] is not None else "",
            Text(row["reason"]),
        )
    return found


def _stage_table(generations: list[dict[str, Any]]) -> Table:
    """Return what every resize cost: milliseconds by stage, and bytes."""
    stages = list(dict.fromkeys(stage for row in generations for stage in row["stages"]))
    label = _labels(generations)
    found = _columns("into", *stages, "state", "moved", title="standstill by stage in ms, bytes sent")
    for row in generations:
        if row["stages"]:
            ms = [f"{row['stages'][stage] * 1000:.1f}" if stage in row["stages"] else "" for stage in stages]
            found.add_row(label(row), *ms, decimal(row["state_bytes"]), decimal(row["moved_bytes"]))
    return found


def _newcomer_table(newcomers: list[dict[str, Any]]) -> Table:
    stages = list(dict.fromkeys(stage for newcomer in newcomers for stage in newcomer["stages"]))
    found = _columns("newcomer", "host", "how", *stages, title="newcomers' own stages in s")
    for newcomer in newcomers:
        seconds = [f"{newcomer['stages'][stage]:.2f}" if stage in newcomer["stages"] else "" for stage in stages]
        found.add_row(str(newcomer["member"]), newcomer["host"], newcomer["how"], *seconds)
    return found
