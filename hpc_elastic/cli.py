"""The command `hpc-elastic`. Ranks never import this module.

Exit codes: 0 done, 1 the job failed or a needed check did, 2 wrong usage or settings, 3 the script never called he.run,
4 no such run or not running, 5 refused, 6 no answer in time, 7 bad data, 130 interrupted.
"""
# ruff: noqa: D301 - each command imports what it needs, so that the others start fast; \b is click's

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from . import __version__
from .config import from_environment, from_file, merge
from .control import (
    CODES,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_USAGE,
    Json,
    Run,
    ask,
    checkpointed,
    ended,
    errors,
    resized,
)
from .errors import ConfigError, RunDirectoryError
from .looking import inspect, report, tensorboard, verify
from .model import Request
from .rundir import RunDirectory
from .standing import past, remarks, silence, stand, standing
from .streams import have_all, put
from .submit import submit

app = typer.Typer(
    help="Elastic MPI jobs: ranks come and go while the job runs, and the bits stay the same.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # the others fold the examples into one line
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the job failed or a needed check did, 2 usage or settings, 3 the script never called "
    "he.run, 4 no such run or not running, 5 refused, 6 no answer in time, 7 bad data, 130 interrupted.",
)

Timeout = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait for the answer, and for the end.")]

Minimum = Annotated[int | None, typer.Option("--min", min=1, help="Fewest ranks.")]
Maximum = Annotated[int | None, typer.Option("--max", min=0, help="Most ranks; 0, the default: as many as slots.")]
Ranks = Annotated[int | None, typer.Option("-n", "--ranks", min=1, help="Ranks to grow to at once.")]
Slots = Annotated[int | None, typer.Option(min=0, help="Slots of this machine; 0, the default: its cores.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any other setting, as NAME=VALUE.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpc-elastic {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(context_settings={"allow_interspersed_args": False}, no_args_is_help=True)
def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="Script that calls he.run, or with -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGUMENT", help="The script's own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in `python -m`.")] = False,
    minimum: Minimum = None,
    maximum: Maximum = None,
    ranks: Ranks = None,
    slots: Slots = None,
    policy: Annotated[str | None, typer.Option(help="manual, fixed, timetable, considerate, greedy.")] = None,
    timetable: Annotated[str | None, typer.Option(help="Sizes by step, see the last example.")] = None,
    microbatches: Annotated[int | None, typer.Option(min=1, help="Microbatches a step: fixes the bits.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the samples' order.")] = None,
    hold: Annotated[bool | None, typer.Option("--hold", help="Stand still until newcomers are there: tests.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Run directory; by default a new one below runs/.")] = None,
    progress: Annotated[str | None, typer.Option(help="auto, plain or off.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    setting: Settings = None,
) -> None:
    """Run SCRIPT as an elastic job. Options of hpc-elastic stand before SCRIPT, the script's own behind it.

    \b
    Examples:
      hpc-elastic run train.py --epochs 5
      hpc-elastic run --max 4 --slots 4 -m jobs.image.train
      hpc-elastic run --config job.toml --set deadline_s=60 train.py
      hpc-elastic run --timetable 40:3,120:2-0 train.py    # 3 ranks from step 40 on, then 2, rank 0 leaving
    """
    from .supervisor import Supervisor

    # A run directory that can't be used is a wrong setting here.
    with errors({**CODES, RunDirectoryError: EXIT_USAGE}):
        given: dict[str, Any] = {
            "min": minimum,
            "max": maximum,
            "ranks": ranks,
            "slots": slots,
            "policy": policy or ("timetable" if timetable else None),
            "timetable": timetable,
            "microbatches": microbatches,
            "seed": seed,
            "hold": hold,
            "run_dir": run_dir,
            "progress": progress,
            **dict(_pair(item) for item in setting or []),
        }
        given = merge(from_file(config) if config else {}, from_environment(os.environ), given)
        _check_timetables(given)
        supervisor = Supervisor.start(script, arguments or [], given, module=module)
        put(sys.stderr, f"run directory {supervisor.run.path}\n")
        raise typer.Exit(supervisor.go())


app.command(context_settings={"allow_interspersed_args": False}, no_args_is_help=True)(submit)


@app.command()
def resume(
    run: Run,
    minimum: Minimum = None,
    maximum: Maximum = None,
    ranks: Ranks = None,
    slots: Slots = None,
    setting: Settings = None,
) -> None:
    """Start a run again that failed, was stopped or was killed, from its last checkpoint.

    Its script, arguments, working directory and settings are those of then; options win over the settings. The environment's
    settings don't count. What is left of the run on this machine is ended first.

    \b
    Examples:
      hpc-elastic resume runs/train-20300101-120000
      hpc-elastic resume runs/train-20300101-120000 --ranks 8 --slots 8 --set deadline_s=60
    """
    from .supervisor import Supervisor

    with errors():
        directory = RunDirectory(run)
    with errors({**CODES, RunDirectoryError: EXIT_REFUSED}):
        given = merge(
            {"min": minimum, "max": maximum, "ranks": ranks, "slots": slots},
            dict(_pair(item) for item in setting or []),
        )
        _check_timetables(given)
        supervisor = Supervisor.resume(directory, given)
        put(sys.stderr, f"run directory {directory.path}, {supervisor.origin()}\n")
        raise typer.Exit(supervisor.go())


def _check_timetables(given: dict[str, Any]) -> None:
    from .broker.script import ScriptBroker
    from .policy import Timetable

    if given.get("timetable"):
        Timetable.parse(str(given["timetable"]))
    if given.get("supply"):
        ScriptBroker.parse(str(given["supply"]))


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not (name and equals):
        raise ConfigError(f"--set {item}: write --set NAME=VALUE")
    return name, value


@app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Print how a run stands.

    \b
    Example:
      hpc-elastic status runs/train-20300101-120000 --json
    """
    from .progress import describe

    with errors():
        directory = RunDirectory(run)
        (found, failure), before = stand(directory), past(directory)
        if as_json:
            typer.echo(msgspec.json.encode({**msgspec.structs.asdict(found), **before}).decode())
            return
        typer.echo(f"{standing(found)}: {describe(found)}{silence(found)}")
        for rank, member in enumerate(found.members):
            typer.echo(f"  rank {rank}: process {member.id}, pid {member.pid} on {member.host}, slot {member.slot}")
        for line in [*remarks(before), *([failure.error] if failure else [])]:
            typer.echo(f"  {line}")


@app.command()
def resize(
    run: Run,
    ranks: Annotated[int, typer.Argument(metavar="RANKS", min=1, help="Number of ranks to have.")],
    timeout_s: Timeout = 30.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the job has that many ranks.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a running job to have RANKS ranks.

    \b
    Examples:
      hpc-elastic resize runs/train-20300101-120000 4
      hpc-elastic resize runs/train-20300101-120000 2 --wait --timeout 120
    """
    done = (lambda directory: resized(directory, ranks)) if wait else None
    with errors():
        ask(run, Request("resize", ranks), timeout_s, as_json=as_json, what="resize", wait=done)


@app.command()
def stop(
    run: Run,
    timeout_s: Timeout = 30.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the job has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a running job to end at its next step.

    \b
    Example:
      hpc-elastic stop runs/train-20300101-120000 --wait
    """
    with errors():
        ask(run, Request("stop"), timeout_s, as_json=as_json, what="stop", wait=ended if wait else None)


@app.command()
def checkpoint(
    run: Run,
    timeout_s: Timeout = 30.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once it is written.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a running job for a checkpoint at its next step.

    \b
    Example:
      hpc-elastic checkpoint runs/train-20300101-120000 --wait --timeout 300
    """
    with errors():
        ask(run, Request("checkpoint"), timeout_s, as_json=as_json, what="checkpoint", wait=checkpointed if wait else None)


app.command()(verify)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Probe this machine: which MPI, what it can do, how many slots, and what is missing. Takes some seconds.

    \b
    Example:
      hpc-elastic doctor
    """
    from .doctor import examine, table

    with errors():
        checks = examine()
        if as_json:
            typer.echo(msgspec.json.encode(checks).decode())
        else:
            table(checks)
        if any(check.needed and not check.good for check in checks):
            raise typer.Exit(EXIT_FAILED)


@app.command(no_args_is_help=True)
def pack(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE", help="idx(.gz) or npz files, or a folder of PNG/JPEG images.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")],
    labels: Annotated[Path | None, typer.Option(help="Labels: an idx or npy file, or text, one number a line.")] = None,
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 1,
    size: Annotated[str | None, typer.Option(help="Scale images to HEIGHTxWIDTH.")] = None,
    gray: Annotated[bool, typer.Option("--gray", help="Make images gray.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
) -> None:
    """Make HDF5 shards from images, and print their names.

    \b
    Examples:
      hpc-elastic pack train-images.gz --labels train-labels.gz --out data/train --shards 4
      hpc-elastic pack photos/ --size 224x224 --out data/photos
    """
    from .pack import pack as make
    from .progress import counting

    with errors():
        scaled = _size(size)
        with counting("packing") as show:
            made = make(
                sources, out, labels=labels, shards=shards, size=scaled, gray=gray, overwrite=overwrite, progress=show
            )
        for path in made:
            typer.echo(path)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ConfigError(f"--size {text}: write HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width)


app.command(no_args_is_help=True)(inspect)
app.command()(report)
app.command()(tensorboard)


def main() -> None:
    """Be the command."""
    have_all()
    app(prog_name="hpc-elastic")


if __name__ == "__main__":
    main()
