"""The exact sum against MPI's, and against what the memory can move.

    python -m benchmarks.allreduce --json [--ranks 2 4] [--rounds 11] [--bytes 4096 ...] [--start world grown] [--nodes 1 2]

Ranks add up float32 arrays, the kinds of sums in turns. `speedup_vs_mpi` is the time of MPI_Allreduce, from one array into
another one, divided by that of the exact sum of values that lie ``in place``, in the memory that the ranks share; that were
``copied`` there, as `step.add` does; or of an ``own array`` by `he.allreduce`, copied there and back. Times are those of the
slowest rank. With ``world`` the ranks are started together, with ``grown`` one after another, into one MPI world each. With
``--nodes 2`` they are on two nodes of a Slurm cluster for tests, each with a network of its own (root only).

`memory_fraction` is the rate of the sum in place over that of ``np.add(a, b, out=c)``, which all ranks do at once, each on
arrays of its share. The bytes that are counted are those which have to be read and written: of R ranks' arrays of n bytes
(R + 1) n for the sum, and 3 n for the additions. `memory_gb_s` is the latter rate.

With torch installed `speedup_vs_gloo` is there as well.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show
from .running import measured

JOB = Path(__file__).with_name("allreduce_job.py")
KB, MB = 1 << 10, 1 << 20
SIZES = (4 * KB, 64 * KB, MB, 25 * MB, 100 * MB)
FASTER = 3.0  # than MPI, from 1 MB up
AS_FAST = 0.5  # a small sum may take twice as long
ACROSS = 1.0  # between nodes, from 1 MB up
OF_MEMORY = 0.6
KINDS = ("in place", "copied", "own array")


def on_one(start: str, ranks: int, rounds: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Measure on this host."""
    launcher, vendor = find_mpiexec()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        file = Path(folder) / "found.json"
        arguments = [str(JOB), str(file), str(ranks), str(rounds), *map(str, sizes)]
        if start == "world":
            return measured([str(launcher), *vendor.launch, "-n", str(ranks), sys.executable, *arguments], file, {})
        run = [sys.executable, "-m", "hpc_elastic.cli", "run", "--ranks", str(ranks), "--slots", str(ranks)]
        return measured([*run, *arguments], file, {})


def on_two(ranks: int, rounds: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Measure on two nodes of a cluster for tests."""
    from .slurm import cluster

    settings = ["broker=slurm", f"ranks_per_node={ranks // 2}", "stall_s=20", "policy=greedy"]
    options = ["--max", str(ranks), *(word for each in settings for word in ("--set", each))]
    with cluster(2, isolate=True) as up, tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        file = Path(folder) / "found.json"
        run = [sys.executable, "-m", "hpc_elastic.cli", "run", *options, str(JOB), str(file), str(ranks), str(rounds)]
        job = ["sbatch", "--wait", "--quiet", "--nodes=1", "--exclusive", f"--output={folder}/out"]
        return measured(up.command([*job, "--wrap", shlex.join([*run, *map(str, sizes)])]), file, up.environ)


def records(found: dict[str, Any], context: dict[str, Any]) -> Iterator[Record]:
    """Yield the figures."""
    ranks, nodes = context["ranks"], context["nodes"]
    for nbytes, took in found["seconds"].items():
        where = {**context, "bytes": int(nbytes)}
        large = int(nbytes) >= MB
        for kind in KINDS:
            goal = None
            if kind == "in place":
                goal = (ACROSS if large else None) if nodes > 1 else (FASTER if large else AS_FAST)
            for other in ("mpi", "gloo"):
                if other in took:
                    ratios = [theirs / ours for ours, theirs in zip(took[kind], took[other], strict=True)]
                    yield record(
                        f"speedup_vs_{other}",
                        ratios,
                        "x",
                        {**where, "values": kind},
                        goal if other == "mpi" else None,
                        "higher",
                    )
        yield record("sum_us", [1e6 * one for one in took["in place"]], "us", where)
        if nodes == 1 and large:
            both = zip(took["in place"], took["memory"], strict=True)
            fractions = [(ranks + 1) / 3 * memory / ours for ours, memory in both]
            yield record("memory_fraction", fractions, "", where, OF_MEMORY, "higher")
            rates = [3 * int(nbytes) / one / 1e9 for one in took["memory"]]
            yield record("memory_gb_s", rates, "GB/s", where, None, "higher")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=11, help="of large arrays; of small ones there are 20 times as many")
    parser.add_argument("--bytes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--start", nargs="+", default=["world", "grown"], choices=["world", "grown"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1], choices=[1, 2])
    given = parser.parse_args()
    try:
        mpi = find_mpiexec()[1].key
    except LaunchError as error:
        cannot(str(error))
    shown: list[Record] = []
    for nodes in given.nodes:
        for ranks in given.ranks:
            for start in given.start if nodes == 1 else ["grown"]:
                begun = time.monotonic()
                found = (
                    on_one(start, ranks, given.rounds, given.bytes)
                    if nodes == 1
                    else on_two(ranks, given.rounds, given.bytes)
                )
                if found["hosts"] != nodes:
                    cannot(f"the ranks were on {found['hosts']} hosts, not on {nodes}")
                context = {"ranks": ranks, "nodes": nodes, "mpi": mpi, "grown": start == "grown"}
                shown += records(found, context)
                print(f"{context}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    show(shown, as_json=given.json)


if __name__ == "__main__":
    main()
