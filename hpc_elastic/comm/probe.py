"""What `hpc-elastic doctor` runs to see what MPI does here: a program run by path, which imports nothing of the package.

    python -P probe.py library|init|spawn SECONDS

Prints one JSON object. It ends itself after SECONDS, with what it has spawned: a broken MPI waits for ever.
"""

import json
import signal
import sys
import time

LEVELS = ("single", "funneled", "serialized", "multiple")


def library(MPI):
    """Say which library is loaded; this needs no MPI_Init."""
    return {"library": MPI.Get_library_version().rstrip("\0"), "standard": list(MPI.Get_version())}


def init(MPI):
    """Initialise MPI, and say which threads it allows."""
    begun = time.perf_counter()
    # The standard orders the levels but leaves their values open.
    values = (MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE)
    level = MPI.Init_thread(MPI.THREAD_MULTIPLE)
    seconds = time.perf_counter() - begun
    MPI.Finalize()
    return {"init_s": seconds, "threads": LEVELS[values.index(level)]}


def spawn(MPI):
    """Spawn one process, merge with it, and add something up; that process runs the same function."""
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    parent = MPI.Comm.Get_parent()
    newcomer = parent != MPI.COMM_NULL
    begun = time.perf_counter()
    arguments = ["-P", __file__, "spawn", sys.argv[2]]
    inter = parent if newcomer else MPI.COMM_SELF.Spawn(sys.executable, arguments, maxprocs=1)
    spawned = time.perf_counter()
    merged = inter.Merge(high=newcomer)
    ranks = merged.allreduce(1)
    merge_s = time.perf_counter() - spawned
    inter.Free()
    merged.Free()
    MPI.Finalize()
    return None if newcomer else {"spawn_s": spawned - begun, "merge_s": merge_s, "ranks": ranks}


def main():
    signal.alarm(max(1, int(sys.argv[2])))
    import mpi4py

    mpi4py.rc(initialize=False, finalize=False)
    from mpi4py import MPI

    found = {"library": library, "init": init, "spawn": spawn}[sys.argv[1]](MPI)
    if found is not None:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
