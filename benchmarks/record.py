"""The one form in which benchmarks print."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One figure: the median of `n` runs. `goal` None means that none was set."""

    metric: str
    value: float
    unit: str
    better: str
    goal: float | None
    met: bool | None
    n: int
    min: float
    max: float
    context: dict[str, Any]


def record(
    metric: str,
    values: Sequence[float],
    unit: str,
    context: dict[str, Any],
    goal: float | None = None,
    better: str = "lower",
) -> Record:
    """Return the record of `values`, of which `better` ones are ``lower`` or ``higher``."""
    values = [float(value) for value in values]
    median = statistics.median(values)
    met = None if goal is None else bool(median <= goal if better == "lower" else median >= goal)
    return Record(
        metric,
        round(median, 4),
        unit,
        better,
        goal,
        met,
        len(values),
        round(min(values), 4),
        round(max(values), 4),
        context,
    )


def show(records: Sequence[Record], *, as_json: bool) -> None:
    """Print `records` on stdout."""
    if as_json:
        for item in records:
            print(json.dumps(asdict(item)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "context", "median", "min", "max", "n", "goal", "met")
    for item in records:
        text = ", ".join(f"{key} {value}" for key, value in item.context.items())
        goal = "" if item.goal is None else f"{item.goal:g}"
        met = "" if item.met is None else "yes" if item.met else "NO"
        table.add_row(
            item.metric, text, f"{item.value:g} {item.unit}", f"{item.min:g}", f"{item.max:g}", str(item.n), goal, met
        )
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def cannot(reason: str) -> None:
    """End because the benchmark can't run."""
    print(f"can't run: {reason}", file=sys.stderr)
    sys.exit(2)
