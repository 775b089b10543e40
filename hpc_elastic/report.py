"""What happened in a run, from its directory: generations, what each resize cost, newcomers, refusals, the failure."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from . import events

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .rundir import RunDirectory, Status

LIVE = ("starting", "running")


def summarize(run: RunDirectory) -> dict[str, Any]:
    """Return what happened in `run` so far, as values that JSON can express.

    Times are in seconds, sizes in bytes. What is not known, or not known yet, is None.

    Raises
    ------
    RunDirectoryError
        If a file of the run is damaged.
    """
    happened = events.read(run.events)
    status, failure = run.status(), run.failure()
    started = next((event for event in happened if isinstance(event, events.Started)), None)
    ended = next((event for event in reversed(happened) if isinstance(event, events.Ended)), None)
    epochs = [event for event in happened if isinstance(event, events.Epoch)]
    generations = _generations(happened, status)
    summary: dict[str, Any] = {
        "run": str(run.path),
        "script": started.script if started else None,
        "mpi": " ".join(started.mpi.split()) if started else None,
        "settings": started.settings if started else {},
        "hosts": _hosts(happened),
        "state": "failed" if failure else status.state if status else "starting",
        "started": started.time if started else None,
        "seconds": ended.seconds if ended else _seconds(started, happened, status),
        "ranks": ended.ranks if ended else status.ranks if status else generations[-1]["ranks"] if generations else None,
        "steps": sum(generation["steps"] for generation in generations),
        "steps_planned": status.steps if status else None,
        "epochs": len(epochs),
        "unit": _unit(epochs, status),
        "metrics": dict(status.metrics if status and status.metrics else epochs[-1].metrics if epochs else {}),
        "under_way": status.under_way if status and status.state in LIVE and not failure else "",
        "generations": generations,
        "newcomers": _told(happened, events.Ready),
        "refusals": _told(happened, events.Refused),
        "notices": _told(happened, events.Notice),
        "processes": [
            {**msgspec.to_builtins(record.member), "outcome": record.outcome, "peak_bytes": record.peak_bytes}
            for record in run.records()
        ],
        "failure": msgspec.to_builtins(failure) if failure else None,
    }
    return summary


def _told(happened: Sequence[events.AnyEvent], kind: type[events.Event]) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(event) for event in happened if isinstance(event, kind)]


def _hosts(happened: Sequence[events.AnyEvent]) -> list[str]:
    seeds = [host for event in happened if isinstance(event, events.Started) for host in event.hosts]
    return list(dict.fromkeys([*seeds, *(event.host for event in happened if isinstance(event, events.Ready))]))


def _seconds(started: events.Started | None, happened: Sequence[events.AnyEvent], status: Status | None) -> float | None:
    if started is None:
        return None
    running = status is not None and status.state == "running"
    return (time.time() if running else max(event.time for event in happened)) - started.time


def _unit(epochs: Sequence[events.Epoch], status: Status | None) -> str:
    if status is not None and status.unit != "samples":
        return status.unit
    # A job without a data set counts one a turn.
    return "turns" if epochs and epochs[-1].samples == epochs[-1].step + 1 else "samples"


# --- generations ------------------------------------------------------------------------------------------------------


def _generations(happened: Sequence[events.AnyEvent], status: Status | None) -> list[dict[str, Any]]:
    """Return one row for each generation: how it came to be, what that cost, and what was done in it."""
    rows: list[dict[str, Any]] = []
    holds = False
    for event in happened:
        if isinstance(event, events.Started):
            holds = bool(event.settings.get("hold"))
            row = _empty(0, 0, event.ranks, event.time)
            rows.append({**row, "joined": list(range(event.ranks)), "reason": "start"})
        elif isinstance(event, events.Resized) and rows:
            # With hold the members did not step on while the newcomers got ready.
            idle_s = event.standstill_s + (event.wait_s if holds else 0.0)
            _reach(rows[-1], event.step, event.time - idle_s)
            rows.append(_resized(event))
        elif isinstance(event, events.Epoch) and rows:
            row = rows[-1]
            if not row["steps"]:  # the first epoch began when the script was ready to train, which is what counts
                row["begin"] = max(row["begin"], event.time - event.seconds)
            _reach(row, event.step + 1, event.time)
            # Samples of a step: all epochs are alike.
            row["batch"] = event.samples * (event.epoch + 1) / (event.step + 1)
        elif isinstance(event, events.Ended) and rows:
            _reach(rows[-1], event.steps, event.time)
        elif isinstance(event, events.Failed) and rows and event.step >= rows[-1]["to_step"]:
            _reach(rows[-1], event.step, event.time)
    if rows and status is not None and status.state in LIVE and status.time > rows[-1]["end"]:
        _reach(rows[-1], max(status.step, rows[-1]["to_step"]), status.time)
    batch = next((row["batch"] for row in reversed(rows) if row["batch"]), None)
    return [_finished(row, batch) for row in rows]


def _reach(row: dict[str, Any], step: int, when: float) -> None:
    """Note that `step` steps were done at time `when`; a second loop of the script counts from 0 again."""
    new = step - row["to_step"] if step >= row["to_step"] else step
    row["to_step"] = step
    if new:  # what follows the last step is no part of its pace
        row["steps"] += new
        row["end"] = when


def _resized(event: events.Resized) -> dict[str, Any]:
    return {
        **_empty(event.generation, event.step, event.after, event.time),
        "joined": list(event.joined),
        "left": list(event.left),
        "reason": event.reason,
        "standstill_s": event.standstill_s,
        "stages": event.stages,
        "wait_s": event.wait_s,
        "state_bytes": event.state_bytes,
        "moved_bytes": event.moved_bytes,
    }


def _empty(number: int, step: int, ranks: int, when: float) -> dict[str, Any]:
    place = {"number": number, "ranks": ranks, "from_step": step, "to_step": step, "steps": 0}
    cost = {"standstill_s": 0.0, "stages": {}, "wait_s": 0.0, "state_bytes": 0, "moved_bytes": 0}
    return {**place, "joined": [], "left": [], "reason": "", **cost, "begin": when, "end": when, "batch": None}


def _finished(row: dict[str, Any], batch: float | None) -> dict[str, Any]:
    begin, end = row.pop("begin"), row.pop("end")
    per_step = row.pop("batch") or batch
    rate = row["steps"] / (end - begin) if row["steps"] and end > begin else None
    samples = rate * per_step if rate is not None and per_step else None
    return {**row, "seconds": end - begin, "steps_per_s": rate, "samples_per_s": samples}


# --- for people -------------------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> None:
    """Print on stdout what `summarize` returned."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(_header(summary))
    if summary["generations"]:
        console.print(_generation_table(summary["generations"], summary["unit"]))
    if any(row["stages"] for row in summary["generations"]):
        console.print(_stage_table(summary["generations"]))
    if summary["newcomers"]:
        console.print(_newcomer_table(summary["newcomers"]))
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
        "steps": f"{summary['steps']}" + (f" of {planned}" if planned and planned > summary["steps"] else ""),
        "metrics": metrics,
    }.items():
        if value:
            grid.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return grid


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


def _generation_table(generations: list[dict[str, Any]], unit: str) -> Table:
    known = any(row["samples_per_s"] for row in generations)
    pace, unit = ("samples_per_s", unit) if known else ("steps_per_s", "turns" if unit == "turns" else "steps")
    found = _columns("gen", "steps", "ranks", "who", "standstill", "ready in", f"{unit}/s", "why")
    for row in generations:
        who = [f"+{member}" for member in row["joined"]] + [f"-{member}" for member in row["left"]]
        found.add_row(
            str(row["number"]),
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
    found = _columns("into", *stages, "state", "moved", title="standstill by stage in ms, bytes sent")
    for row in generations:
        if row["stages"]:
            ms = [f"{row['stages'][stage] * 1000:.1f}" if stage in row["stages"] else "" for stage in stages]
            found.add_row(str(row["number"]), *ms, decimal(row["state_bytes"]), decimal(row["moved_bytes"]))
    return found


def _newcomer_table(newcomers: list[dict[str, Any]]) -> Table:
    stages = list(dict.fromkeys(stage for newcomer in newcomers for stage in newcomer["stages"]))
    found = _columns("newcomer", "host", *stages, title="newcomers' own stages in s")
    for newcomer in newcomers:
        seconds = [f"{newcomer['stages'][stage]:.2f}" if stage in newcomer["stages"] else "" for stage in stages]
        found.add_row(str(newcomer["member"]), newcomer["host"], *seconds)
    return found
