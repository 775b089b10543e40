"""Sums of arrays on GPUs: the exact one, NCCL's or MPI's, and copying to the host by hand.

    python -m benchmarks.gpu --json [--ranks 2] [--rounds 21] [--bytes 4096 ...]

`sum_us` is what `he.allreduce` of a CuPy array takes, into another one; `speedup_vs_library` the time with ``exact=False``
divided by that; `speedup_vs_by_hand` the time of a copy to the host, `he.allreduce` there, and a copy back, divided by
that. Times are those of the slowest rank. `way` in the context tells what was chosen: ``nccl`` where each rank has a GPU of
its own, else ``staged``. Needs a GPU, and CuPy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from hpc_elastic.arrays import gpu
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .allreduce import KB, MB
from .record import Record, cannot, record, show
from .running import measured

JOB = Path(__file__).with_name("gpu_job.py")
SIZES = (4 * KB, 64 * KB, MB, 25 * MB, 100 * MB)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES))
    given = parser.parse_args()
    if gpu.library() is None:
        cannot("no GPU: CuPy (the extra gpu) is not installed, or sees none")
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    shown: list[Record] = []
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            run = [sys.executable, "-m", "hpc_elastic.cli", "run", "--ranks", str(ranks), "--slots", str(ranks)]
            file = Path(folder) / "found.json"
            found = measured([*run, str(JOB), str(file), str(ranks), str(given.rounds), *map(str, given.bytes)], file, {})
        for nbytes, took in found["seconds"].items():
            context = {"bytes": int(nbytes), "ranks": ranks, "way": found["way"], "mpi": mpi}
            shown.append(record("sum_us", [1e6 * one for one in took["exact"]], "us", context))
            for other in ("library", "by hand"):
                ratios = [theirs / ours for ours, theirs in zip(took["exact"], took[other], strict=True)]
                name = f"speedup_vs_{other.replace(' ', '_')}"
                shown.append(record(name, ratios, "x", context, None, "higher"))
    show(shown, as_json=given.json)


if __name__ == "__main__":
    main()
