"""How resizes, sums and broadcasts grow with the number of ranks: 1 -> 2 -> 4 -> ... -> 32 -> 16 -> ... -> 1, repeated.

    python -m benchmarks.growth --json [--ranks 2 4 8 16 32] [--cycles 3] [--rounds 10]

One host, and more ranks than cores: they take turns on them, so that even what all do side by side takes as many times as
long. `resize_s` is how long the leader stood still at a resize to that size (``grow``) or from it (``shrink``), from the
run's events. `sum_s` is `he.allreduce`, `broadcast_s` is `he.broadcast`, both of 1 MB, in turns, on the slowest rank.

What is fitted is t = c n^k and, for comparison, t = a + b n. The exponents k are `resize_exponent`, `sum_exponent` and
`broadcast_exponent`, one for each cycle; a, b and c are of the medians. 1 MB is registered, which newcomers receive.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show
from .running import BrokenError, Running

MB = 1 << 20
APART = 30  # steps between two resizes, at least
LIMIT_S = 280.0
Found = dict[int, list[list[float]]]  # by ranks, for each time that the job had as many


def power(points: Mapping[int, float]) -> tuple[float, float]:
    """Return c and k of t = c n^k through `points`, by n: least squares of the logarithms."""
    k, log_c = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
    return float(np.exp(log_c)), float(k)


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """Return a and b of t = a + b n through `points`, by n: least squares."""
    b, a = np.polyfit(list(points), list(points.values()), 1)
    return float(a), float(b)


def run(sizes: Sequence[int], cycles: int, rounds: int) -> dict[tuple[str, str], Found]:
    """Run the job through all cycles; return the seconds by metric and change."""
    way = [*sizes, *reversed(sizes[:-1]), 1] * cycles
    timetable = ",".join(f"{APART * number}:{size}" for number, size in enumerate(way, 1))
    options = ["--slots", str(max(sizes)), "--timetable", timetable]
    with Running(options, "growth_job.py", str(rounds), MB, look_s=0.5) as job:
        job.until(lambda: len(job.happened(events.Resized)) == len(way), "all resizes were done", LIMIT_S)
        changes = job.happened(events.Resized)
        expected = sum(size > 1 for size in way)
        job.until(lambda: len(list(job.stamps.glob("*.json"))) == expected, "all sizes were measured")
        job.stop()
        files = sorted(job.stamps.glob("*.json"), key=lambda file: int(file.stem))
        measured = [json.loads(file.read_text()) for file in files]
    found: dict[tuple[str, str], Found] = defaultdict(lambda: defaultdict(list))
    for change in changes:
        grows = change.after > change.before
        found["resize", "grow" if grows else "shrink"][max(change.before, change.after)].append([change.standstill_s])
    for one in measured:
        for kind, seconds in one["seconds"].items():
            found[kind, ""][one["ranks"]].append(seconds)
    return found


def records(found: Mapping[tuple[str, str], Found], mpi: str) -> Iterator[Record]:
    """Yield the figures, and behind those of each kind what was fitted."""
    for (kind, change), by_ranks in found.items():
        context: dict[str, Any] = {"mpi": mpi, **({"change": change} if change else {"bytes": MB})}
        for ranks, times in by_ranks.items():
            yield record(f"{kind}_s", [second for once in times for second in once], "s", {"ranks": ranks, **context})
        points = {ranks: statistics.median(second for once in times for second in once) for ranks, times in by_ranks.items()}
        c, _ = power(points)
        a, b = line(points)
        fitted = {"ranks": list(points), "c_s": round(c, 6), "a_s": round(a, 6), "b_s": round(b, 6)}
        each = zip(*by_ranks.values(), strict=False)  # the largest size comes once in a cycle, the others twice
        exponents = [power(dict(zip(by_ranks, map(statistics.median, once), strict=True)))[1] for once in each]
        yield record(f"{kind}_exponent", exponents, "", {**context, **fitted})


def main() -> None:
    """Measure, fit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="rising, at least two of them")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="sums and broadcasts at each size, each time")
    given = parser.parse_args()
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    try:
        found = run(given.ranks, given.cycles, given.rounds)
    except BrokenError as error:
        cannot(str(error))
    show(list(records(found, mpi)), as_json=given.json)


if __name__ == "__main__":
    main()
