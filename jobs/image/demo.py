"""The main job, twice: on one static rank, and going 1 -> 3 -> 2 with rank 0 leaving; both must end with the same bits.

python -m jobs.image.demo
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from hpc_elastic import events

from .prepare import prepare

LEAST_ACCURACY = 0.90
RUNS = Path("runs")


def job(name: str, epochs: int, data: str, options: list[str]) -> tuple[str, float, list[int]]:
    """Run the job with `options` of hpc-elastic run; return the weights' SHA-256, the accuracy and the sizes it went to."""
    run = RUNS / f"demo-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [
        "hpc-elastic",
        "run",
        "--run-dir",
        str(run),
        *options,
        "-m",
        "jobs.image.train",
        "--epochs",
        str(epochs),
        "--data",
        data,
    ]
    print(f"\n$ {' '.join(command)}", flush=True)
    program = [sys.executable, "-m", "hpc_elastic.cli", *command[1:]]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.split())
    if process.returncode != 0:
        sys.exit(f"the {name} job ended with exit code {process.returncode}; see {run}")
    found = {words[0]: words[1] for words in lines if len(words) > 1}
    if options:
        print(f"\n$ hpc-elastic report {run}", flush=True)
        subprocess.run([sys.executable, "-m", "hpc_elastic.cli", "report", str(run)], check=True)
    resizes = [event for event in events.read(run / "events.jsonl") if isinstance(event, events.Resized)]
    return found["sha256"], float(found["accuracy"]), [event.after for event in resizes]


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--data", choices=["digits", "fashion"], default="digits")
    settings = parser.parse_args()
    train, _ = prepare(settings.data, "upright", Path("data") / f"{settings.data}-upright")
    print(f"\n$ hpc-elastic inspect {train}", flush=True)
    subprocess.run([sys.executable, "-m", "hpc_elastic.cli", "inspect", str(train)], check=True)
    static, _, _ = job("static", settings.epochs, settings.data, [])
    elastic, accuracy, sizes = job(
        "elastic", settings.epochs, settings.data, ["--slots", "4", "--timetable", "40:3,500:2-0"]
    )
    same = static == elastic
    print(f"\nstatic  {static}\nelastic {elastic}\n{'the same bits' if same else 'DIFFERENT BITS'}, accuracy {accuracy:.4f}")
    if sizes != [3, 2]:
        sys.exit(f"the elastic job should have gone to 3 and 2 ranks, but went to {sizes}")
    if not same or accuracy < LEAST_ACCURACY:
        sys.exit(1)


if __name__ == "__main__":
    main()
