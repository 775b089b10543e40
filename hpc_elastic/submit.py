"""`hpc-elastic submit`: writes the batch script of an elastic job, and submits it."""
# ruff: noqa: D301 - \b is click's

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .control import errors

STOPPED = 130  # exit code of a job that was stopped, and has a checkpoint
BEFORE_END_S = 60


@dataclass(frozen=True)
class Batch:
    """What a batch script does.

    Attributes
    ----------
    name : str
        Of the job.
    run_dir : Path
        The run directory: where it exists, the run goes on.
    command : tuple of str
        What stands behind ``hpc-elastic run --run-dir DIR``.
    options : tuple of str
        Options of sbatch.
    requeues : bool
        True has a job that was stopped before its time limit submitted again, until it has ended.
    """

    name: str
    run_dir: Path
    command: tuple[str, ...]
    options: tuple[str, ...] = ()
    requeues: bool = True

    def script(self, python: str = sys.executable) -> str:
        """Return the batch script."""
        program = [python, "-m", "hpc_elastic.cli"]
        run = shlex.join([*program, "run", "--run-dir", str(self.run_dir), "--set", "broker=slurm", *self.command])
        resume = shlex.join([*program, "resume", str(self.run_dir)])
        options = [
            f"--job-name={self.name}",
            "--nodes=1",
            "--exclusive",
            f"--output={self.run_dir}.out",
            "--open-mode=append",
            f"--signal=B:TERM@{BEFORE_END_S}",
            *(["--requeue"] if self.requeues else ["--no-requeue"]),
            *self.options,
        ]
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "# One node to begin with: the job takes idle ones, and gives them back when others want them.",
            f"if [ -e {shlex.quote(str(self.run_dir))}/launch.json ]; then",
            f"    {resume} &",
            "else",
            f"    {run} &",
            "fi",
            "job=$!",
            "trap 'kill -TERM \"$job\"' TERM  # Slurm sends it before the time limit: a checkpoint, and the end",
            'wait "$job"; code=$?',
            'while kill -0 "$job" 2>/dev/null; do wait "$job"; code=$?; done',
        ]
        if self.requeues:
            lines.append(f'if [ "$code" -eq {STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi')
        return "\n".join([*lines, 'exit "$code"', ""])


def submit(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="Script that calls he.run, or with -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENT", help="The script's own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in `python -m`.")] = False,
    time: Annotated[str | None, typer.Option(help="Time limit, as sbatch takes it.")] = None,
    partition: Annotated[str | None, typer.Option("-p", "--partition", help="Partition.")] = None,
    account: Annotated[str | None, typer.Option("-A", "--account", help="Account.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Another option of sbatch, as --sbatch=--mem=8G.")] = None,
    maximum: Annotated[
        int | None, typer.Option("--max", min=0, help="Most ranks; 0, the default: as many as microbatches.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as NAME=VALUE.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; by default a new one below runs/.")] = None,
    requeue: Annotated[bool, typer.Option(help="Go on in another job after the time limit.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script, and submit nothing.")] = False,
) -> None:
    """Submit SCRIPT to Slurm as an elastic job: it starts on one node, and takes idle ones.

    \b
    Examples:
      hpc-elastic submit --time 8:00:00 train.py --epochs 50
      hpc-elastic submit --max 16 -p gpu --sbatch=--gres=gpu:1 -m jobs.image.train
      hpc-elastic submit --dry-run train.py > train.sbatch
    """
    from .places import unused_below
    from .scripts import check

    stem = script.rsplit(".", 1)[-1] if module else Path(script).stem
    options = [
        f"--{name}={value}" for name, value in (("time", time), ("partition", partition), ("account", account)) if value
    ]
    command = [*(["--max", str(maximum)] if maximum is not None else [])]
    command += [part for pair in setting or [] for part in ("--set", pair)]
    command += [*(["-m"] if module else []), script, *(arguments or [])]
    with errors():
        check(script, Path.cwd(), module=module)
        folder = (run_dir or unused_below(Path("runs"), stem)).absolute()
        batch = Batch(stem, folder, tuple(command), (*options, *(sbatch or [])), requeue)
        if dry_run:
            typer.echo(batch.script(), nl=False)
            return
        from .broker.slurm.choosing import choose

        folder.parent.mkdir(parents=True, exist_ok=True)
        number = choose().slurm.submit(batch.script())
    typer.echo(f"submitted as job {number}; it prints to {folder}.out")
    typer.echo(f"follow it with: hpc-elastic status {shlex.quote(str(folder))}")
