"""What `hpc-elastic doctor` runs to see what MPI does here: run by path, it imports nothing of the package.

    python -P probe.py library|init|spawn SECONDS

Prints one JSON object. It ends itself after SECONDS, with what it has spawned: a broken MPI waits for ever.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

LEVELS = ("single", "funneled", "serialized", "multiple")


def library(mpi: Any) -> dict[str, Any]:
    """Say which library is loaded; this needs no MPI_Init."""
    return {"library": mpi.Get_library_version().rstrip("\0"), "standard": list(mpi.Get_version())}


def init(mpi: Any) -> dict[str, Any]:
    """Initialise MPI, and say which threads it allows."""
    begun = time.perf_counter()
    # The standard orders the levels but leaves their values open.
    values = (mpi.THREAD_SINGLE, mpi.THREAD_FUNNELED, mpi.THREAD_SERIALIZED, mpi.THREAD_MULTIPLE)
    level = mpi.Init_thread(mpi.THREAD_MULTIPLE)
    seconds = time.perf_counter() - begun
    mpi.Finalize()
    return {"init_s": seconds, "threads": LEVELS[values.index(level)]}


def spawn(mpi: Any) -> dict[str, Any] | None:
    """Spawn one process, merge with it, and add something up; that process runs the same function."""
    mpi.Init_thread(mpi.THREAD_MULTIPLE)
    parent = mpi.Comm.Get_parent()
    newcomer = parent != mpi.COMM_NULL
    begun = time.perf_counter()
    arguments = ["-P", __file__, "spawn", sys.argv[2]]
    inter = parent if newcomer else mpi.COMM_SELF.Spawn(sys.executable, arguments, maxprocs=1)
    spawned = time.perf_counter()
    merged = inter.Merge(high=newcomer)
    ranks = merged.allreduce(1)
    merge_s = time.perf_counter() - spawned
    inter.Free()
    merged.Free()
    segments = shared_memory()
    mpi.Finalize()
    for segment in segments:  # Open MPI leaves the one of a process that had no launcher
        segment.unlink(missing_ok=True)
    return None if newcomer else {"spawn_s": spawned - begun, "merge_s": merge_s, "ranks": ranks}


def shared_memory() -> list[Path]:
    """Return the files of shared memory that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [Path("/" + line.partition(" /")[2]) for line in lines if " /dev/shm/" in line and "(deleted)" not in line]


def main() -> None:
    """Be the program."""
    signal.alarm(max(1, int(sys.argv[2])))
    import mpi4py

    mpi4py.rc(initialize=False, finalize=False)
    from mpi4py import MPI

    found = {"library": library, "init": init, "spawn": spawn}[sys.argv[1]](MPI)
    if found is not None:
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
