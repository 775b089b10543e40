"""How soon a job on Slurm gets nodes and gives them back, and what it costs to watch a large queue. On a cluster for tests.

    python -m benchmarks.slurm --json [--rounds 10] [--nodes 200] [--jobs 500]

A NumPy job in an allocation of one node of two takes the other one, and gives it back when somebody waits for it, again and
again. `grow_s` counts from the decision until the newcomer has finished its first step; `give_back_s` from the decision
until Slurm has the node back; `wait_s` from the submission of a job that waits for the node until it runs, and `ours_s` the
part of it until Slurm has the node: the rest is Slurm's own cycle. `idle_wait_s` is that of such a job on an idle node.

Then a cluster of many nodes with many jobs in its queue: `poll_cpu_ms` is what rank 0 spends on a look at it, `poll_ms` how
long that takes, and `watched_step_ratio` compares the steps of a job that watches it with those of one that does not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from hpc_elastic import events
from hpc_elastic.broker.slurm.commands import Commands
from hpc_elastic.broker.slurm.companions import Files
from hpc_elastic.broker.slurm.wishes import Needs, seen_from
from slurm.cluster import Cluster, ClusterError
from slurm.cluster.configuration import Shape

from .record import Record, cannot, record, show
from .running import BrokenError, Running

GOALS = {"grow_s": 0.6, "give_back_s": 0.3, "ours_s": 1.0, "poll_cpu_ms": 100.0}
TURNS, STEADY = 1_000_000, 20
LOOK_S = 0.004
LIMIT_S = 60.0
SETTINGS = ("broker=slurm", "stall_s=10")


@contextmanager
def cluster(nodes: int, **shape: Any) -> Iterator[Cluster]:
    """Have a cluster, to which this process's own commands speak."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
        up = stack.enter_context(Cluster(Path(folder) / "c", Shape(nodes, **shape)))
        stack.enter_context(up.in_environ())
        yield up


def job(up: Cluster, most: int, *settings: str, more: Sequence[str] = ()) -> Running:
    """Start the job in an allocation of one node."""
    options = ["--max", str(most), *(word for each in (*SETTINGS, *settings) for word in ("--set", each))]
    under = ["salloc", "--quiet", "--nodes=1", "--exclusive", "--time=60", *more]
    return Running(options, "losses_job.py", "numpy", TURNS, under=under, environ=up.environ, look_s=0.2)


def waits(up: Cluster) -> tuple[float, float]:
    """Submit a job that wants one node alone, and return when that was and when it ran."""
    begun = time.time()
    done = up.run(["srun", "--nodes=1", "--exclusive", "date", "+%s.%N"], limit_s=LIMIT_S)
    return begun, float(done.stdout.split()[-1])


class Watch:
    """Looks all the time whether companions have their nodes, until the block is left."""

    def __init__(self, up: Cluster) -> None:
        self._up = up
        self._over = threading.Event()
        self.free_at = [time.time()]  # when they had none, as it was seen

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        command = ["squeue", "--noheader", "--states=RUNNING,COMPLETING", "--format=%j"]
        while not self._over.wait(LOOK_S):
            now = time.time()
            done = subprocess.run(command, env=self._up.environ, check=False, capture_output=True, text=True)
            if done.returncode == 0 and not any(name.endswith("+") for name in done.stdout.split()):
                self.free_at.append(now)


def come_and_go(rounds: int) -> Iterator[Record]:
    """Yield how soon nodes come and go."""
    context: dict[str, Any] = {"mpi": "mpich", "nodes": 2}
    found: dict[str, list[float]] = {name: [] for name in ("grow_s", "give_back_s", "wait_s", "ours_s", "idle_wait_s")}
    stages: list[dict[str, float]] = []
    with cluster(2) as up:
        context["slurm"] = Commands().release()
        for _ in range(rounds):
            begun, ran = waits(up)
            found["idle_wait_s"].append(ran - begun)
        since = time.time()
        with job(up, 2) as running:
            for number in range(rounds):
                running.until(lambda since=since: running.steady(2, STEADY, since), "2 ranks")
                grown = running.happened(events.Decided, since)[0]
                newcomer = next(
                    rows for rows in running.rows().values() if rows["time"][0] > grown.time and rows["size"][0] == 2
                )
                found["grow_s"].append(float(newcomer["time"][0]) - grown.time)
                stages.append(running.happened(events.Ready, grown.time)[0].stages)
                time.sleep(0.1 * (number % 10))  # at any moment of Slurm's rounds
                with Watch(up) as watch:
                    begun, ran = waits(up)
                gone = running.happened(events.Decided, begun)[0]
                free = min(at for at in watch.free_at if at > gone.time)
                found["give_back_s"].append(free - gone.time)
                found["ours_s"].append(free - begun)
                found["wait_s"].append(ran - begun)
                since = ran
            running.stop()
    names = {name: [1e3 * each[name] for each in stages if name in each] for name in stages[0]}
    more = {"stages_ms": {name: round(float(np.median(values)), 1) for name, values in names.items()}}
    for name, values in found.items():
        yield record(name, values, "s", {**context, **(more if name == "grow_s" else {})}, GOALS.get(name))


def large(nodes: int, jobs: int, rounds: int) -> Iterator[Record]:
    """Yield what it costs to watch a large queue."""
    with cluster(nodes, cpus=1, memory_mb=100) as up:
        submit = ["sbatch", "--output=/dev/null", "--exclusive", "--wrap", "sleep 1000"]
        up.run([*submit, "--nodes=1"])  # as long as it runs, none of the others can
        for number in range(jobs):
            up.run([*submit, f"--nodes={nodes}", f"--job-name=job{number}"])
        context: dict[str, Any] = {"slurm": Commands().release(), "nodes": nodes, "jobs": jobs}
        commands, wall, cpu = Commands(), [], []
        own = next(iter(commands.snapshot().jobs))
        needs = Needs.of(own, "here", 1, ())
        with tempfile.TemporaryDirectory() as folder:
            companions = Files(Path(folder)).read()
        for _ in range(rounds):
            begun, spent = time.perf_counter(), time.process_time()
            queue = seen_from(commands.snapshot(), needs, companions)
            queue.room({}, is_considerate=True)
            wall.append(1e3 * (time.perf_counter() - begun))
            cpu.append(1e3 * (time.process_time() - spent))
        yield record("poll_cpu_ms", cpu, "ms", context, GOALS["poll_cpu_ms"])
        yield record("poll_ms", wall, "ms", context)
        took: dict[str, list[float]] = {"slurm": [], "local": []}
        for _ in range(rounds):
            for broker, values in took.items():
                values.append(step_s(up, broker))
        ratios = [a / b for a, b in zip(took["slurm"], took["local"], strict=True)]
        medians = {f"step_{name}_ms": round(1e3 * float(np.median(values)), 2) for name, values in took.items()}
        yield record("watched_step_ratio", ratios, "", {**context, **medians})


def step_s(up: Cluster, broker: str) -> float:
    """Return how long a step takes, on average over some seconds, with a `broker`."""
    with job(up, 1, f"broker={broker}", "slots=1", more=["--partition=urgent"]) as running:
        running.until(lambda: running.steady(1, 400), "steps")
        (rows,) = running.rows().values()
        running.stop()
    return float(np.diff(rows["time"][50:]).mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=200, help="of the large cluster; 0 leaves it out")
    parser.add_argument("--jobs", type=int, default=500, help="in its queue")
    given = parser.parse_args()
    found: list[Record] = []
    try:
        found += come_and_go(given.rounds)
        if given.nodes:
            found += large(given.nodes, given.jobs, given.rounds)
    except (BrokenError, ClusterError) as error:
        show(found, as_json=given.json)
        print(error, file=sys.stderr)
        cannot(str(error))
    show(found, as_json=given.json)


if __name__ == "__main__":
    main()
