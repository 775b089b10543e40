"""One script, three ways: how long each system stands still, and which samples count, when workers come and go.

    benchmarks/peers/setup.sh                       # once: Horovod and torch, each in an environment of its own
    python -m benchmarks.peers --json [--system hpc_elastic] [--runs 3] [--results FOLDER]

A Dense model learns to tell upright from upside-down pieces of clothing (Fashion-MNIST). It begins with one worker. A
second one is **added**, **removed**, and added again; then it is **killed** by SIGKILL. The standstill is the longest time
between two successive finished steps around the change, less the median of such times before. What counts of the samples is
taken from the workers' ledgers. A system that is not installed gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hpc_elastic.shards import open_shards
from jobs.image.prepare import prepare

from ..record import show
from .schedule import go
from .systems import SYSTEMS
from .table import records

DATA = {"fashion": 3, "digits": 45}  # epochs, so that there are as many steps


def data_of(folder: Path, name: str) -> None:
    """Make the data in `folder`: shards, and the same as NumPy files."""
    for part in prepare(name, "upright", folder):
        with open_shards(part) as shards:
            everything = shards.gather(np.arange(len(shards)))
        for field in ("image", "label"):
            np.save(folder / f"{part.name}-{field}.npy", everything[field])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--system", choices=SYSTEMS, action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data", choices=DATA, default="fashion")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds in each step, in place of a larger model")
    parser.add_argument("--results", type=Path, help="folder of results: earlier ones in it count as well")
    settings = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    results = settings.results or folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    wanted = [SYSTEMS[name] for name in settings.system or SYSTEMS]
    missing = {system.name: why for system in wanted if (why := system.missing())}
    data_of(folder / "data", settings.data)
    for number in range(settings.runs):
        for system in wanted:  # in turns: the machine has quick and slow hours
            if system.name in missing:
                continue
            own = folder / f"{system.name}-{number}"
            print(f"run {number + 1} of {settings.runs}, {system.name}", file=sys.stderr, flush=True)
            found = go(system, own, DATA[settings.data], settings.pause)
            (results / f"{system.name}-{time.time_ns()}.json").write_text(json.dumps(found))
            if found["troubles"]:
                print(f"  kept: {own}", file=sys.stderr)
            else:
                shutil.rmtree(own)
    for system in wanted:
        found = [json.loads(path.read_text()) for path in sorted(results.glob(f"{system.name}-*.json"))]
        if found:
            show(records(system, found), as_json=settings.json)
        else:
            why = missing.get(system.name, "no results")
            print(
                json.dumps({"system": system.name, "missing": why}) if settings.json else f"{system.name}: {why}", flush=True
            )
    shutil.rmtree(folder / "data")
    if not any(path.is_dir() for path in folder.iterdir() if path != results):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
