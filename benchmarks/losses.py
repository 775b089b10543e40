"""How soon a job trains again after a rank is killed, and after all of it is killed: a job of 3 ranks, again and again.

    python -m benchmarks.losses --json [--how spawn|join|restart|all] [--job numpy] [--cycles 10] [--seed 1]

With ``spawn`` and ``join``, a random rank is killed by SIGKILL while all compute. All times count from there: `again_s`
until the last survivor has finished a step without it, `replaced_s` until its replacement has finished its first step. With
``restart``, the launcher and all ranks are killed: `restart_s` until the next attempt has finished its first step, and
`lost_steps`, those that have to be done once more. The ranks stamp every step they have finished; the stages of the way
there are from these stamps, from the newcomer's own, and from the run's events.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import psutil

from hpc_elastic import events
from hpc_elastic.comm.vendor import Vendor, find_mpiexec
from hpc_elastic.errors import LaunchError

from .record import Record, cannot, record, show
from .running import BrokenError, Running

RANKS = 3
TURNS = 200_000  # more than enough: the job is stopped after the last loss
CHECKPOINT_STEPS = 20
ALL = "all was lost"
STEADY = 40  # steps that all ranks have done together before a loss
AT_RANDOM_S = 0.3  # and some time more, so that losses fall on any moment
GOALS = {  # of the NumPy job; with TensorFlow the times are stated
    ("mpich", "spawn", "again_s"): 0.05,
    ("mpich", "spawn", "replaced_s"): 0.6,
    ("openmpi", "spawn", "replaced_s"): 0.6,
    ("mpich", "join", "replaced_s"): 1.0,
    ("mpich", "restart", "restart_s"): 4.0,
    ("openmpi", "restart", "restart_s"): 4.0,
    ("mpich", "restart", "lost_steps"): CHECKPOINT_STEPS,
    ("openmpi", "restart", "lost_steps"): CHECKPOINT_STEPS,
}


@dataclass(frozen=True)
class Case:
    """What is measured: which job, on which MPI, and how it goes on."""

    mpi: str
    how: str
    job: str

    def running(self) -> Running:
        """Start the job."""
        options = [
            "--ranks",
            str(RANKS),
            "--slots",
            str(RANKS),
            "--set",
            f"arrival={'join' if self.how == 'join' else 'spawn'}",
        ]
        if self.how == "restart":
            options += ["--set", f"checkpoint_steps={CHECKPOINT_STEPS}"]
        return Running(options, "losses_job.py", self.job, TURNS)

    def record(self, metric: str, values: Sequence[float], unit: str, **more: Any) -> Record:
        """Return the record of `values`."""
        goal = GOALS.get((self.mpi, self.how, metric)) if self.job == "numpy" else None
        return record(metric, values, unit, {"mpi": self.mpi, "how": self.how, "job": self.job, **more}, goal)


@dataclass(frozen=True)
class Loss:
    """What came of one kill; `seconds` by metric, and by metric and stage."""

    seconds: dict[str, float]
    stages: dict[str, dict[str, float]]
    leader: bool = False
    lost_steps: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{metric} {value:.3f}" for metric, value in self.seconds.items())


def between(names: str, times: Sequence[float]) -> dict[str, float]:
    """Return how long each of the stages `names` took, with `times` where the first begins and where each ends."""
    return {name: float(after - before) for name, (before, after) in zip(names.split(), pairwise(times), strict=True)}


# --- one rank is lost -------------------------------------------------------------------------------------------------


def lose_rank(running: Running, rank: int) -> Loss | str:
    """Kill `rank`, wait for its replacement, and return how long all took; if more than that was lost, return what."""
    victim = running.status().members[rank]
    before = set(running.rows())
    killed = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    running.until(lambda: running.steady(RANKS, STEADY, killed), f"{RANKS} ranks again")
    if running.happened(events.Restarted, killed):
        return ALL
    (lost, *more) = running.happened(events.Lost, killed)
    if more or len(lost.members) > 1:
        return "a survivor was lost as well"
    return replace(timed(running, killed, lost, before), leader=rank == 0)


def timed(running: Running, killed: float, lost: events.Lost, before: set[str]) -> Loss:
    """Return how long it took from the time `killed` on; `before` are the processes that there were then."""
    after = {name: rows[rows["time"] > killed] for name, rows in running.rows().items()}
    (newcomer,) = (name for name in after if name not in before)
    fewer = [rows["time"][rows["size"] < RANKS] for name, rows in after.items() if name != newcomer]
    again = max(times[0] for times in fewer if len(times))
    replaced = after[newcomer]["time"][0]
    member = after[newcomer]["member"][0]
    ready = next(event for event in running.happened(events.Ready, killed) if event.member == member)
    resized = next(event for event in running.happened(events.Resized, killed) if member in event.joined)
    decided = [event for event in running.happened(events.Decided, killed) if event.time < ready.time][-1]
    own = running.began(newcomer)
    begun = lost.time - lost.recovery_s
    commit = resized.time - resized.standstill_s
    way = between("notice recover step", [killed, begun, lost.time, again])
    whole = between(
        "notice recover decide fork imports script connect standstill step",
        [killed, begun, lost.time, decided.time, own["born"], own["script"], own["ready"], commit, resized.time, replaced],
    )
    stages = {"again_s": way, "replaced_s": whole, "spawn": {"spawn": ready.stages["spawn"]}, "resize": resized.stages}
    return Loss({"again_s": again - killed, "replaced_s": replaced - killed}, stages)


def losses(case: Case, cycles: int, seed: int) -> list[Record]:
    """Return the records of a job that loses a rank `cycles` times. A new job is started if one does not go on live."""
    draw = random.Random(seed)
    found: list[Loss | str] = []
    while len(found) < cycles:
        begun = len(found)
        try:
            with case.running() as running:
                running.until(lambda now=running: now.steady(RANKS, STEADY), f"{RANKS} ranks")
                while len(found) < cycles and ALL not in found[begun:]:
                    time.sleep(draw.uniform(0, AT_RANDOM_S))
                    rank = draw.randrange(RANKS)
                    found.append("")
                    found[-1] = lose_rank(running, rank)
                    say(case, f"kill {len(found)} of {cycles}, rank {rank}: {found[-1]}")
                running.stop()
        except BrokenError as error:
            if len(found) == begun:
                raise
            found[-1] = found[-1] or str(error)
            say(case, f"kill {len(found)} of {cycles}, rank {rank}: {error}")
    good = [loss for loss in found if isinstance(loss, Loss)]
    others = Counter(loss for loss in found if isinstance(loss, str))
    if not good:
        cannot(f"no loss of one rank was gone on after: {dict(others)}")
    records = []
    for metric in ("again_s", "replaced_s"):
        of_leader = [loss.seconds[metric] for loss in good if loss.leader]
        more: dict[str, Any] = {"seed": seed, "not_counted": dict(others), "stages_ms": stages_ms(good, metric)}
        if metric == "replaced_s":
            more |= {"of_connect_ms": stages_ms(good, "spawn"), "of_standstill_ms": stages_ms(good, "resize")}
        if of_leader:
            more["rank_0_s"] = round(statistics.median(of_leader), 4)
        records.append(case.record(metric, [loss.seconds[metric] for loss in good], "s", **more))
    return records


def stages_ms(found: Sequence[Loss], which: str) -> dict[str, float]:
    """Return the medians of stages."""
    parts = [loss.stages[which] for loss in found]
    return {name: round(1e3 * statistics.median(part.get(name, 0.0) for part in parts), 1) for name in parts[0]}


# --- all is lost ------------------------------------------------------------------------------------------------------


def lose_all(running: Running) -> Loss:
    """Kill the launcher and all ranks, and return how long it took until the job went on, and with how many steps lost."""
    pids = [child.pid for child in psutil.Process(running.process.pid).children()]
    pids += [member.pid for member in running.status().members]
    before = set(running.rows())
    killed = time.time()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    running.until(lambda: any(len(rows) for name, rows in running.rows().items() if name not in before), "a restart")
    rows = running.rows()
    reached = max(rows[name]["step"][-1] for name in before if len(rows[name]))
    first = min((name for name in rows if name not in before and len(rows[name])), key=lambda name: rows[name]["time"][0])
    own = running.began(first)
    again, resumed = rows[first]["time"][0], rows[first]["step"][0]
    (restarted,) = running.happened(events.Restarted, killed)
    started = running.happened(events.Started, killed)[0]
    times = [killed, restarted.time, own["born"], own["script"], started.time, own["turn"], again]
    stages = between("clear launch start init restore step", times)
    return Loss({"restart_s": again - killed}, {"restart_s": stages}, lost_steps=int(reached + 1 - resumed))


def restarts(case: Case, cycles: int, seed: int) -> list[Record]:
    """Return the records of `cycles` jobs that are killed whole: one that is restarted repeatedly waits longer each time."""
    draw = random.Random(seed)
    found = []
    for number in range(cycles):
        with case.running() as running:
            running.until(lambda now=running: now.steady(RANKS, STEADY), f"{RANKS} ranks")
            running.until(lambda now=running: now.happened(events.Checkpointed), "a checkpoint")
            time.sleep(draw.uniform(0, AT_RANDOM_S))
            found.append(lose_all(running))
            running.stop()
        say(case, f"kill {number + 1} of {cycles}, all: {found[-1]}, {found[-1].lost_steps} steps lost")
    seconds = [loss.seconds["restart_s"] for loss in found]
    lost_steps = case.record("lost_steps", [loss.lost_steps for loss in found], "steps", checkpoint_steps=CHECKPOINT_STEPS)
    if lost_steps.goal is not None:
        lost_steps = replace(lost_steps, met=lost_steps.max <= lost_steps.goal)  # it is for each of them
    return [case.record("restart_s", seconds, "s", seed=seed, stages_ms=stages_ms(found, "restart_s")), lost_steps]


# --- the whole --------------------------------------------------------------------------------------------------------


def say(case: Case, text: str) -> None:
    """Tell on stderr how far it is."""
    print(f"{case.mpi}, {case.how}, {case.job}: {text}", file=sys.stderr, flush=True)


def ways(how: str, vendor: Vendor) -> list[str]:
    """Return the ways to go on that are to be measured."""
    if how == "join" and not vendor.joins:
        cannot(f"{vendor.title} does not connect processes of two launchers")
    if how != "all":
        return [how]
    return ["spawn", *(["join"] if vendor.joins else []), "restart"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", choices=["numpy", "tensorflow"], action="append")
    parser.add_argument("--how", choices=["spawn", "join", "restart", "all"], default="all")
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="which ranks are killed, and when")
    settings = parser.parse_args()
    try:
        vendor = find_mpiexec()[1]
    except LaunchError as error:
        cannot(str(error))
    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    jobs = settings.job or ["numpy", *(["tensorflow"] if has_tensorflow else [])]
    if "tensorflow" in jobs and not has_tensorflow:
        cannot("TensorFlow is not installed")
    print(f"seed {settings.seed}", file=sys.stderr)
    for job in jobs:
        for how in ways(settings.how, vendor):
            measure = restarts if how == "restart" else losses
            try:
                found = measure(Case(vendor.key, how, job), settings.cycles, settings.seed)
            except BrokenError as error:
                cannot(f"{vendor.title}, {how}, {job}: {error}")
            show(found, as_json=settings.json)


if __name__ == "__main__":
    main()
