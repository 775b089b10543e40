"""What a step of an elastic job costs that never resizes, against the same training written by hand.

    python -m benchmarks.step --json [--ranks 1 2] [--rounds 41] [--microbatches 1 16]

Softmax regression of random pictures, on ranks that are started together; `handwritten.py` is the hand-written loop. Both
loops run in the same processes, in turns of 20 ms or so, each on its own weights. Times are those of the slowest rank.

`ratio_vs_handwritten` is the time of a step of `job.steps` over that of a step by hand. Both read as many samples a rank,
and each computes as it would: by hand, one gradient of the rank's whole share; in `job.steps`, one of each microbatch. There
are as many microbatches as ranks, so that the computation is the same, or 16, the default, whose bits are the same at up to
16 ranks. That means more gradients, and additions of them, which nobody does by hand; so no goal is set.

`overhead_us` is the time of a step of `job.steps` less that of a third loop, in which each rank computes the same
microbatches, with the same batch and update, and nothing is added up: no sum, no other rank, no runtime. So all is in it:
the order of the samples, the resize point, the vigil, the sum, and what ranks wait for each other. Steps are short there, 64
samples, so that it is not the difference of two large numbers.

`memory_gb_s` is the rate of ``np.add(a, b, out=c)``, which all ranks do at once on 25 MB each: what sums could be had for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show
from .running import measured

JOB = Path(__file__).with_name("step_job.py")
DEFAULT = 16  # microbatches
GOALS_US = {1: 50.0, 2: 150.0}
PIXELS, MB = 28 * 28, 1 << 20
SMALL = "8:64:100"  # classes, batch, steps a round: 25 KB
SHAPES = ("8:1024:10", "8:4096:3", "334:1024:2", "8360:64:1")  # 25 KB twice, 1 MB, 25 MB
AS_FAST, NEARLY = 1.0, 1.02


def run(ranks: int, microbatches: int, rounds: int) -> dict[str, Any]:
    """Run the job, and return what it measured."""
    launcher, vendor = find_mpiexec()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        file = Path(folder) / "found.json"
        command = [str(launcher), *vendor.launch, "-n", str(ranks), sys.executable, str(JOB), str(file), str(rounds)]
        return measured([*command, SMALL, *SHAPES], file, {"HPC_ELASTIC_MICROBATCHES": str(microbatches)})


def records(found: dict[str, Any], context: dict[str, Any]) -> Iterator[Record]:
    """Yield the figures."""
    small, *others = found["seconds"]
    rounds = zip(small["elastic"], small["alone"], strict=True)
    where = {"bytes": 4 * parameters(SMALL), **context}
    yield record(
        "overhead_us", [1e6 * (ours - alone) for ours, alone in rounds], "us", where, GOALS_US.get(context["ranks"])
    )
    for shape, took in zip(SHAPES, others, strict=True):
        nbytes = 4 * parameters(shape)
        goal = None
        if context["microbatches"] == context["ranks"]:
            goal = AS_FAST if nbytes >= 0.98 * MB else NEARLY
        ratios = [ours / theirs for ours, theirs in zip(took["elastic"], took["by hand"], strict=True)]
        by_hand_ms = round(1e3 * statistics.median(took["by hand"]), 2)
        batch = int(shape.split(":")[1])
        where = {"parameters": parameters(shape), "bytes": nbytes, "batch": batch, "by_hand_ms": by_hand_ms, **context}
        yield record("ratio_vs_handwritten", ratios, "", where, goal)
    yield record("memory_gb_s", [rate / 1e9 for rate in found["memory"]], "GB/s", context, None, "higher")


def parameters(shape: str) -> int:
    """Return the number of a model's weights."""
    return PIXELS * int(shape.split(":", maxsplit=1)[0])


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--microbatches", type=int, nargs="+", help="instead of as many as ranks, and the default of 16")
    given = parser.parse_args()
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    for ranks in given.ranks:
        for microbatches in given.microbatches or (ranks, DEFAULT):
            context = {"ranks": ranks, "microbatches": microbatches, "mpi": mpi}
            show(list(records(run(ranks, microbatches, given.rounds), context)), as_json=given.json)


if __name__ == "__main__":
    main()
