"""How well the applications in `jobs/` do: each on one static rank and elastic, with the same bits, beside a baseline.

    python -m benchmarks.applications --json [--only jobs.text] [--data data] [--pictures docs/pictures]

Each is run as its page in `docs/` shows: by `python -m`, and by `hpc-elastic run` going from 1 to 3 to 2 ranks, rank 0
leaving. Both must print the same digest. The baselines are those of scikit-learn in the job's folder, on the same split; the
best of what one prints counts. With ``--pictures`` one elastic run of each job is drawn.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .record import Record, cannot, record, show
from .running import PROGRAM

LIMIT_S = 550
SPLIT_GOAL = 0.92  # of images told upright from upside down


class Case(NamedTuple):
    """A job with its options, when its ranks come and go, its baseline, and what it is to reach."""

    job: str
    module: str
    options: tuple[str, ...]
    timetable: str
    baseline: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    goal: float | None = None
    drawn: bool = False


UPRIGHT = ("--data", "fashion", "--task", "upright")
CLASSES = ("--data", "fashion", "--task", "classes")
WIDER = ("--hidden", "64", "--rate", "0.002", "--epochs", "3")
CASES = (
    Case("image", "jobs.image.train", (*UPRIGHT, "--epochs", "3"), "100:3,900:2-0", UPRIGHT, goal=SPLIT_GOAL),
    Case("image", "jobs.image.train", (*CLASSES, *WIDER), "50:3,500:2-0", CLASSES),
    Case("image", "jobs.image.fit", (*CLASSES, "--model", "cnn", *WIDER), "50:3,500:2-0", CLASSES, drawn=True),
    Case("text", "jobs.text.train", (), "20:3,200:2-0", ("--task", "department"), ("accuracy", "balanced"), drawn=True),
    Case(
        "text",
        "jobs.text.train",
        ("--task", "recommended"),
        "20:3,200:2-0",
        ("--task", "recommended"),
        ("accuracy", "balanced"),
    ),
    Case("recommend", "jobs.recommend.train", (), "20:3,350:2-0", (), ("ndcg@10", "recall@10"), drawn=True),
)


def output(command: list[str]) -> str:
    """Run `command` and return what it prints; end if it fails."""
    print("$", *command[1:], file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        cannot(f"no end within {LIMIT_S} s")
    if done.returncode:
        cannot(f"it ended with exit code {done.returncode}\n{done.stderr}")
    print(done.stdout, file=sys.stderr, flush=True)
    return done.stdout


def value(text: str, name: str) -> str:
    """Return the word behind `name` at the begin of a line."""
    (found,) = re.findall(rf"^{re.escape(name)} +(\S+)", text, flags=re.MULTILINE)
    return str(found)


def best(text: str, name: str) -> float:
    """Return the greatest number behind `name` in what a baseline printed."""
    return max(map(float, re.findall(rf"{re.escape(name)} (\d\.\d+)", text)))


def measure(case: Case, data: Path, folder: Path, picture: Path | None) -> list[Record]:
    """Run a case both ways, and its baseline."""
    command = ["-m", case.module, *case.options, "--folder", str(data)]
    run = folder / f"{case.job}-{len(list(folder.iterdir()))}"
    static = output([sys.executable, *command])
    elastic = output([*PROGRAM, "run", "--run-dir", str(run), "--slots", "4", "--timetable", case.timetable, *command])
    if value(static, "sha256") != value(elastic, "sha256"):
        cannot(f"other bits: {value(static, 'sha256')} and {value(elastic, 'sha256')}")
    place = ["--folder", str(data)] if case.job == "image" else []
    beside = output([sys.executable, "-m", f"jobs.{case.job}.baseline", *case.baseline, *place])
    if picture:
        output([*PROGRAM, "report", str(run), "--svg", str(picture)])
    context = {"job": " ".join([case.module, *case.options]), "sha256": value(static, "sha256")[:12]}
    return [
        record(
            metric,
            [float(value(elastic, metric))],
            "",
            {**context, "baseline": best(beside, metric) if metric in beside else None},
            case.goal,
            "higher",
        )
        for metric in case.metrics
    ]


def main() -> None:
    """Run the cases and print what they reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", metavar="MODULE", help="jobs whose module begins like this")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where the shards are, or will be, put")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    settings = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="applications-") as folder:
        for case in CASES:
            if case.module.startswith(settings.only):
                picture = settings.pictures / f"{case.job}.svg" if settings.pictures and case.drawn else None
                found += measure(case, settings.data, Path(folder), picture)
    show(found, as_json=settings.json)


if __name__ == "__main__":
    main()
