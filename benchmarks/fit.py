"""What a step of an elastic Keras `fit` costs, against the same model trained by Keras alone.

    python -m benchmarks.fit --json [--rounds 21] [--microbatches 2 16]

Two ranks, one thread each, started together. `fit_ratio` is the time of a step inside `fit`, with all that is between two
of its batches, over that of Keras alone, which exchanges nothing: once over what Keras's own `fit` does with arrays, and
once over the graph of Keras's train step, called at the least cost on tensors that are ready. All in the same processes,
by turns, on as many samples a rank. With two microbatches each rank computes one gradient, as Keras does alone; 16 are
the default, whose bits are the same at up to 16 ranks. Times are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import importlib.util
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

JOB = Path(__file__).with_name("fit_job.py")
RANKS, DEFAULT = 2, 16
SHAPES = {"mlp": "mlp:256:32", "cnn": "cnn:128:4", "deep": "deep:256:8"}  # model, batch, steps a round
GOALS = {"mlp": 1.35, "cnn": 1.08, "deep": 1.5}


def records(found: list[dict[str, Any]], context: dict[str, Any]) -> Iterator[Record]:
    """Yield the figures."""
    for name, took in zip(SHAPES, found, strict=True):
        about = {key: took[key] for key in ("parameters", "variables")}
        for over in ("fit", "graph"):
            ratios = [ours / alone for ours, alone in zip(took["elastic"], took[over], strict=True)]
            alone_ms = round(1e3 * statistics.median(took[over]), 2)
            where = {"model": name, **about, "batch": int(SHAPES[name].split(":")[1]), "over": over, "alone_ms": alone_ms}
            yield record("fit_ratio", ratios, "", where | context, GOALS[name] if context["microbatches"] == RANKS else None)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[RANKS, DEFAULT])
    given = parser.parse_args()
    if importlib.util.find_spec("tensorflow") is None:
        cannot("TensorFlow is not installed: make setup installs it with MPICH only")
    try:
        launcher, vendor = find_mpiexec()
    except LaunchError as error:
        cannot(str(error))
    command = [str(launcher), *vendor.launch, "-n", str(RANKS), sys.executable, str(JOB)]
    for microbatches in given.microbatches:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            file = Path(folder) / "found.json"
            # Nobody comes, so there is no warm parent, whose imports would fall into the first rounds.
            own = {"HPC_ELASTIC_MICROBATCHES": str(microbatches), "HPC_ELASTIC_WARM": "off"}
            environ = {**own, "TF_CPP_MIN_LOG_LEVEL": "3"}
            found: Any = measured([*command, str(file), str(given.rounds), *SHAPES.values()], file, environ)
        context = {"ranks": RANKS, "microbatches": microbatches, "mpi": vendor.key}
        show(list(records(found, context)), as_json=given.json)


if __name__ == "__main__":
    main()
