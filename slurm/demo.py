"""One job on a Slurm cluster of this machine, told by its own events. Needs root, and Slurm's packages: make demo-slurm.

It starts on one of four nodes and takes the others. An ordinary job that needs two nodes gets them; when it has ended, the
job takes them again. An urgent job preempts one. Then a node is crashed. The weights must be those of one rank that nothing
happened to, and each sample must have been used once an epoch.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from hpc_elastic import events, inspect
from hpc_elastic.rundir import RunDirectory
from jobs.image.prepare import prepare
from slurm.cluster import Cluster
from slurm.cluster.configuration import Shape

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, "-m", "hpc_elastic.cli"]
STEP_S, LIMIT_S = 0.02, 60.0
ORDINARY_S = 3.0  # how long an ordinary job may wait at most
SAID = (events.Decided, events.Refused, events.Resized, events.Lost, events.Rewound, events.Restarted, events.Ended)

E = TypeVar("E", bound=events.Event)


class Story:
    """A job under way on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, epochs: int) -> None:
        self.cluster = cluster
        self.run = folder / "run"
        self.out = folder / "out"
        settings = ["broker=slurm", "slurm_options=--partition=low", "ledger=true", "stall_s=3", "checkpoint_steps=100"]
        options = ["--run-dir", str(self.run), *(word for each in settings for word in ("--set", each))]
        job = [str(ROOT / "slurm" / "demo_job.py"), str(shards), str(epochs), str(STEP_S)]
        text = (
            f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\nexec {shlex.join([*PROGRAM, 'run', *options, *job])}\n"
        )
        (folder / "job.sh").write_text(text)
        given = ["--nodes=1", "--exclusive", "--job-name=elastic", f"--output={self.out}", str(folder / "job.sh")]
        self.number = cluster.run(["sbatch", "--parsable", *given]).stdout.strip()
        self.begun = time.time()
        self.told = 0

    def say(self, text: str) -> None:
        """Print what happens, and before that what the job has said of itself."""
        for event in self.events()[self.told :]:
            self.told += 1
            print(f"  {event.time - self.begun:6.1f} s   {words(event)}", flush=True)
        if text:
            print(f"  {time.time() - self.begun:6.1f} s > {text}", flush=True)

    def events(self) -> list[events.Event]:
        """Return what has happened so far that is worth telling."""
        file = self.run / "events.jsonl"
        return [event for event in events.read(file) if isinstance(event, SAID)] if file.exists() else []

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Wait."""
        deadline = time.monotonic() + LIMIT_S
        while not done():
            if time.monotonic() > deadline:
                self.say("")
                sys.exit(f"{what}: not within {LIMIT_S:.0f} s")
            self.say("")
            time.sleep(0.05)

    def ranks(self, n: int) -> None:
        """Wait until the job has `n` ranks."""

        def there() -> bool:
            status = RunDirectory(self.run).status() if (self.run / "status.json").exists() else None
            return status is not None and status.ranks == n

        self.until(there, f"{n} ranks")

    def ended(self) -> bool:
        """Tell whether the job is over."""
        done = self.cluster.run(["squeue", "--noheader", "--states=all", f"--jobs={self.number}", "--format=%T"])
        return done.stdout.strip() not in {"PENDING", "RUNNING", "COMPLETING"}

    def other(self, name: str, nodes: int, partition: str) -> float:
        """Run a job of somebody's that lasts 2 s, and return how long it waited for its nodes."""
        self.say(f"{name} job wants {nodes} node{'s' if nodes > 1 else ''}")
        submitted = time.time()
        command = ["srun", "--exclusive", f"--nodes={nodes}", f"--ntasks={nodes}", f"--partition={partition}"]
        done = self.cluster.run([*command, "sh", "-c", "date +%s.%N; sleep 2"])
        waited = float(done.stdout.split()[0]) - submitted
        self.say(f"{name} job has run; it had waited for {waited:.1f} s")
        return waited


def words(event: events.Event) -> str:
    """Return an event in words."""
    match event:
        case events.Decided():
            return f"decided: {event.before} -> {event.after} ranks, since {event.reason}"
        case events.Refused():
            return f"no {event.ranks} ranks: {event.reason}"
        case events.Resized():
            still_ms = 1e3 * event.standstill_s
            return f"{event.before} -> {event.after} ranks at step {event.step}, all stood still for {still_ms:.0f} ms"
        case events.Lost():
            return f"lost: {event.how}; {event.before} -> {event.after} ranks, going on with step {event.step}"
        case events.Ended():
            return f"ended after {event.steps} steps"
    return type(event).__name__.lower()


def once(run: Path, samples: int, epochs: int) -> bool:
    """Tell whether each sample was used once an epoch, by the run's ledger: the last attempt at a step counts."""
    parts = [np.fromfile(file, np.int64).reshape(-1, 4) for file in (run / "ledger").iterdir()]
    epoch, step, attempt, sample = np.concatenate(parts).T
    last = np.full(step.max() + 1, -1)
    np.maximum.at(last, step, attempt)
    counts = attempt == last[step]
    return all(np.array_equal(np.sort(sample[counts & (epoch == e)]), np.arange(samples)) for e in range(epochs))


def sha256_of(text: str) -> str:
    """Return the weights' SHA-256 that a job printed."""
    found = [line.split()[1] for line in text.splitlines() if line.startswith("sha256 ")]
    return found[-1] if found else "none"


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=22)
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the cluster's munge is in it
        shards, _ = prepare("digits", "classes", folder / "data")
        samples = inspect.describe([str(shards)])["samples"]
        print("\none rank, and nothing happens", flush=True)
        job = [str(ROOT / "slurm" / "demo_job.py"), str(shards), str(epochs), "0"]
        command = [*PROGRAM, "run", "--run-dir", str(folder / "static"), "--slots", "1", "--progress", "off", *job]
        static = sha256_of(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print("\nfour nodes, and all sorts of things", flush=True)
        with Cluster(folder / "cluster", Shape(4, isolate=True, grace_s=5)) as cluster:
            story = Story(cluster, folder, shards, epochs)
            story.ranks(4)
            waited = story.other("an ordinary", 2, "low")
            story.ranks(4)
            story.other("an urgent", 1, "urgent")
            story.ranks(4)
            story.say("node n4 crashes")
            cluster.crash("n4")
            story.until(lambda: any(isinstance(event, events.Lost | events.Restarted) for event in story.events()), "a loss")
            story.until(story.ended, "the end")
            story.say("")
        elastic, all_once = sha256_of(story.out.read_text()), once(story.run, samples, epochs)
    print(f"\none rank {static}\nelastic  {elastic}")
    print(f"{'the same bits' if static == elastic else 'DIFFERENT BITS'}; ", end="")
    print("each sample once an epoch" if all_once else "SAMPLES ARE MISSING")
    if static != elastic or not all_once:
        sys.exit(1)
    if waited > ORDINARY_S:
        sys.exit(f"the ordinary job waited for {waited:.1f} s")


if __name__ == "__main__":
    main()
