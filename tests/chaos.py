"""Throws random troubles at a real job, round after round, and looks at what comes out.

    python -m tests.chaos --rounds 100 --seed 1 --mpi mpich

The MPI is that of the running Python's environment. A round is drawn from its seed: resizes, settings, kills, stops, delays,
refused slots. It has to end with the bits of a static run and with each sample once, or with the error documented for what
can't be survived; and nothing may be left of it. Every fourth seed's job has a distributed array, the others train.
``--replay SEED`` runs one round again.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.rundir import RunDirectory

from . import shards
from .afterwards import OUTCOMES, check_ledger, happened, outcome, resizes
from .launch import SCRIPTS, Done, Job, hpc_elastic, memories_apart
from .troubles import Round

EPOCHS, BATCH, PAUSE_S = 12, 64, 0.02
STEPS = EPOCHS * -(-shards.SAMPLES // BATCH)
LIMIT_S = 120.0
GAVE_UP, FAILED, WRONG = "gave up", "program's error", "WRONG"
JOBS, HEAT_EVERY = ("softmax", "heat"), 4
COLUMNS = (*OUTCOMES, GAVE_UP, FAILED, WRONG)


@dataclass(frozen=True)
class Result:
    """What came of a round; with `wrong` it should not have."""

    job: str
    round: Round
    outcome: str
    seconds: float
    sizes: tuple[int, ...] = ()
    recoveries: int = 0
    restarts: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    wrong: str = ""

    def __str__(self) -> str:
        troubles, sizes = "; ".join(map(str, self.round.troubles)), "-".join(map(str, self.sizes))
        counts = f"{self.recoveries} recovered, {len(self.restarts)} restarts, {self.seconds:.1f} s"
        more = (*self.done, *(f"restart at {reason}" for reason in self.restarts), *self.wrong.splitlines())
        more = "".join(f"\n    {line}" for line in more)
        return f"seed {self.round.seed}, {self.job}: {troubles} -> {self.outcome}, sizes {sizes}, {counts}{more}"


class Chaos:
    """Rounds of one job.

    Parameters
    ----------
    job : str
        "softmax", a training job, or "heat", with a distributed array.
    folder : Path
        Where the rounds run; the shards are there.
    """

    def __init__(self, job: str, folder: Path) -> None:
        self.job = job
        self._folder = folder / job
        self._folder.mkdir()
        self._trains = job == "softmax"
        self._joins = find_mpiexec()[1].joins
        training = [SCRIPTS / "softmax.py", folder, EPOCHS, "--batch", BATCH, "--pause", PAUSE_S]
        self._script = training if self._trains else [SCRIPTS / "plate.py", 65, STEPS, PAUSE_S]
        self._sha256 = self._static()

    def _static(self) -> str:
        """Run the job without resizes and troubles, for what all others are compared with."""
        with Job(hpc_elastic("run", "--run-dir", "static", *self._script), folder=self._folder, limit_s=LIMIT_S) as job:
            done = job.wait()
        assert done.code == 0, done.err
        return done.value("sha256")

    def round(self, seed: int) -> Result:
        """Run a round. Its folder is kept if something is wrong."""
        drawn = Round.draw(seed, STEPS, joins=self._joins)
        folder = Path(tempfile.mkdtemp(prefix=f"round-{seed}-", dir=self._folder))
        begun, ended, wrong, deeds = time.monotonic(), WRONG, "", []
        command = hpc_elastic("run", "--run-dir", "r", *drawn.options, *self._script)
        with Job(command, folder=folder, limit_s=LIMIT_S, environ=drawn.environ) as job:
            try:
                deeds = drawn.disturb(job, folder / "r")
                done = job.wait(clean=False)
                if self._stopped(folder / "r"):
                    job.look_for_rests()
                    with Job(hpc_elastic("resume", "r"), folder=folder, limit_s=LIMIT_S) as again:
                        done = again.wait()
                ended, wrong = self._judge(drawn, done, folder / "r")
                job.look_for_rests()
            except AssertionError as problem:
                wrong += f"{problem}"
        if wrong:
            ended, wrong = WRONG, f"{wrong}\nkept: {folder}\noptions: {' '.join(map(str, drawn.options))}"
        result = self._result(drawn, ended, time.monotonic() - begun, folder / "r", deeds, wrong)
        if not wrong:
            shutil.rmtree(folder)
        return result

    def _result(self, drawn: Round, ended: str, seconds: float, run: Path, deeds: list[str], wrong: str) -> Result:
        with contextlib.suppress(RunDirectoryError):
            sizes = tuple(event.after for event in resizes(run))
            restarted = tuple(f"step {event.step}: {event.reason}" for event in happened(run, events.Restarted))
            recovered = len(happened(run, events.Lost))
            return Result(self.job, drawn, ended, seconds, (1, *sizes), recovered, restarted, tuple(deeds), wrong)
        return Result(self.job, drawn, ended, seconds, done=tuple(deeds), wrong=wrong)

    @staticmethod
    def _stopped(run: Path) -> bool:
        """Tell whether all ranks there were had been told to leave: then the job stops, and can be resumed."""
        with contextlib.suppress(RunDirectoryError):
            status = RunDirectory(run).status()
            return status is not None and status.state == "stopped"
        return False

    def _judge(self, drawn: Round, done: Done, run: Path) -> tuple[str, str]:
        """Return how a round ended, and what is wrong with that."""
        if done.code != 0:
            return self._judge_failure(drawn, done, run)
        if done.value("sha256") != self._sha256:
            return WRONG, "other bits"
        if self._trains:
            check_ledger(run, EPOCHS, shards.SAMPLES)
        return outcome(run), ""

    def _judge_failure(self, drawn: Round, done: Done, run: Path) -> tuple[str, str]:
        failure = RunDirectory(run).failure()
        said = failure.error if failure is not None else ""
        if done.code == 1 and failure is not None:
            if failure.kind == "error" and any(
                f"fault {trouble.text.split(';')[-1]}" in said for trouble in drawn.troubles if trouble.text
            ):
                return FAILED, ""
            # Each blow can cost one restart, and no more.
            if failure.kind == "lost" and f"given up: restarts = {drawn.restarts}" in done.err:
                return GAVE_UP, "" if drawn.restarts < sum(
                    trouble.blows for trouble in drawn.troubles
                ) else "more restarts than blows"
        return WRONG, f"ended with {done.code}: {said}\n{done.err}"


def table(results: list[Result]) -> str:
    """Return a Markdown table of trouble kinds and outcomes: how many, and the median of their seconds."""
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result in results:
        for kind in {trouble.kind for trouble in result.round.troubles}:
            cells[kind, result.outcome].append(result.seconds)
    used = [column for column in COLUMNS if any(column == ended for _, ended in cells)]
    lines = [f"| trouble | {' | '.join(used)} |", "|---|" + "---|" * len(used)]
    for kind in sorted({kind for kind, _ in cells}):
        row = [cells.get((kind, column), []) for column in used]
        texts = [f"{len(each)} ({statistics.median(each):.1f} s)" if each else "" for each in row]
        lines.append(f"| {kind} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the rounds; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next ones follow")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run the round of this seed only")
    parser.add_argument("--mpi", choices=["mpich", "openmpi"], help="check that it is this MPI")
    parser.add_argument("--job", choices=JOBS, help="this job in all rounds")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rounds at a time")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="where to write the table")
    arguments = parser.parse_args()
    vendor = find_mpiexec()[1]
    if arguments.mpi not in (None, vendor.key):
        parser.error(f"this environment has {vendor.title}")
    seeds = range(arguments.seed, arguments.seed + arguments.rounds) if arguments.replay is None else [arguments.replay]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    shards.write(folder)
    chosen = {seed: arguments.job or JOBS[seed % HEAT_EVERY == 0] for seed in seeds}
    chaos = {job: Chaos(job, folder) for job in sorted(set(chosen.values()))}
    results = []
    if arguments.jobs > 1 and not memories_apart():
        parser.error("rounds at a time need /dev/shm apart, which takes a user who may mount: leave --jobs out")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for future in as_completed(pool.submit(chaos[chosen[seed]].round, seed) for seed in seeds):
            results.append(future.result())
            print(results[-1], flush=True)
    wrong = [result.round.seed for result in results if result.wrong]
    title = f"{vendor.title}, {len(results)} rounds from seed {seeds[0]}: {len(wrong)} wrong"
    text = f"{title}\n\n{table(results)}"
    print(f"\n{text}")
    if arguments.table:
        arguments.table.write_text(text)
    if wrong:
        print(f"wrong: seeds {', '.join(map(str, wrong))}; kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
