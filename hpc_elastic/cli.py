"""The command `hpc-elastic`. Ranks never import this module.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or settings, 3 the script never called he.run, 4 no such run or not
running, 5 refused, 6 no answer in time, 7 bad data, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import msgspec
import typer

from .config import build, from_environment, from_file
from .errors import ConfigError, ElasticError, LaunchError, RunDirectoryError, ShardError
from .model import Request
from .rundir import RunDirectory, Status

EXIT_USAGE, EXIT_NO_RUN, EXIT_REFUSED, EXIT_NO_ANSWER, EXIT_DATA = 2, 4, 5, 6, 7
LIVE = ("starting", "running")
STALE_S = 30.0

app = typer.Typer(
    help="Elastic MPI jobs: ranks come and go while the job runs, and the bits stay the same.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the job failed, 2 usage or settings, 3 script never called he.run, 4 no such run or "
    "not running, 5 refused, 6 no answer in time, 7 bad data, 130 interrupted.",
)

Run = Annotated[Path, typer.Argument(help="Run directory, as `hpc-elastic run` made it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the project's errors into a message and an exit code."""
    try:
        yield
    except ElasticError as error:
        codes: dict[type[ElasticError], int] = {
            ConfigError: EXIT_USAGE,
            LaunchError: EXIT_USAGE,
            RunDirectoryError: EXIT_NO_RUN,
            ShardError: EXIT_DATA,
        }
        typer.echo(f"hpc-elastic: {error}", err=True)
        raise typer.Exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1)) from None
    except BrokenPipeError:
        os._exit(0)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[str, typer.Argument(help="Script that calls he.run, or with -m a module.")],
    arguments: Annotated[Optional[list[str]], typer.Argument(help="The script's own arguments.")] = None,  # noqa: UP045
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in `python -m`.")] = False,
    minimum: Annotated[Optional[int], typer.Option("--min", help="Fewest ranks.")] = None,  # noqa: UP045
    maximum: Annotated[Optional[int], typer.Option("--max", help="Most ranks; by default as many as there are slots.")] = None,  # noqa: UP045
    ranks: Annotated[Optional[int], typer.Option("-n", "--ranks", help="Ranks to have from the start on.")] = None,  # noqa: UP045
    slots: Annotated[Optional[int], typer.Option(help="Slots of this machine; by default its cores.")] = None,  # noqa: UP045
    policy: Annotated[Optional[str], typer.Option(help="manual, fixed or timetable.")] = None,  # noqa: UP045
    timetable: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Sizes by step: "40:3,120:2-0" is 3 ranks from step 40 on, 2 from 120 on, rank 0 leaving.'),
    ] = None,
    microbatches: Annotated[Optional[int], typer.Option(help="Microbatches a step: fixes the bits.")] = None,  # noqa: UP045
    seed: Annotated[Optional[int], typer.Option(help="Seed of the samples' order.")] = None,  # noqa: UP045
    hold: Annotated[Optional[bool], typer.Option("--hold", help="Stand still until newcomers are there, for tests.")] = None,  # noqa: UP045
    run_dir: Annotated[Optional[str], typer.Option(help="Run directory; by default a new one below runs/.")] = None,  # noqa: UP045
    progress: Annotated[Optional[str], typer.Option(help="auto, plain or off.")] = None,  # noqa: UP045
    config: Annotated[Optional[Path], typer.Option(help="TOML file of settings.")] = None,  # noqa: UP045
    setting: Annotated[Optional[list[str]], typer.Option("--set", help="Any other setting, as NAME=VALUE.")] = None,  # noqa: UP045
) -> None:
    """Run SCRIPT as an elastic job.

    Examples:

        hpc-elastic run train.py --epochs 5

        hpc-elastic run --max 4 --slots 4 --timetable 40:3,120:2-0 -m jobs.image.train

        hpc-elastic run --config job.toml --set deadline_s=60 train.py
    """
    from .supervisor import Supervisor

    with _errors():
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
        settings = build(from_file(config) if config else {}, from_environment(os.environ), given)
        supervisor = Supervisor(script, arguments or [], settings, module=module)
        typer.echo(f"run directory {supervisor.run.path}", err=True)
        raise typer.Exit(supervisor.go())


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"--set {item}: write --set NAME=VALUE")
    return name, value


@app.command()
def status(run: Run, as_json: Json = False) -> None:
    """Print how a run stands.

    Example:

        hpc-elastic status runs/train-20300101-120000 --json
    """
    from .progress import describe

    with _errors():
        found = _status(RunDirectory(run))
        if as_json:
            typer.echo(msgspec.json.encode(found).decode())
            return
        typer.echo(f"{found.state}: {describe(found)}")
        age = time.time() - found.time
        if found.state in LIVE and age > STALE_S:
            typer.echo(f"the last sign of life is {age:.0f} s old")
        for rank, member in enumerate(found.members):
            typer.echo(f"  rank {rank}: process {member.id}, pid {member.pid} on {member.host}, slot {member.slot}")
        failure = RunDirectory(run).failure()
        if failure is not None:
            typer.echo(f"  {failure.error}")


def _status(run: RunDirectory) -> Status:
    found = run.status()
    if found is None:
        raise RunDirectoryError(f"{run.path} has no status yet: the job has not reached its first step")
    return found


@app.command()
def resize(
    run: Run,
    ranks: Annotated[int, typer.Argument(help="Number of ranks to have.")],
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 30.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the job has that many ranks.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a running job to have RANKS ranks.

    Examples:

        hpc-elastic resize runs/train-20300101-120000 4

        hpc-elastic resize runs/train-20300101-120000 2 --wait
    """
    _ask(run, Request("resize", ranks), timeout_s, as_json, (lambda now: now.ranks == ranks) if wait else None)


@app.command()
def stop(
    run: Run,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 30.0,
    wait: Annotated[bool, typer.Option("--wait", help="Return once the job has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a running job to end at its next step.

    Example:

        hpc-elastic stop runs/train-20300101-120000 --wait
    """
    _ask(run, Request("stop"), timeout_s, as_json, (lambda now: now.state not in LIVE) if wait else None)


def _ask(path: Path, request: Request, timeout_s: float, as_json: bool, done: Callable[[Status], bool] | None) -> None:
    with _errors():
        run = RunDirectory(path)
        found = _status(run)
        if found.state not in LIVE:
            raise RunDirectoryError(f"the job in {path} is not running: it has {found.state}")
        name = run.ask(request)
        deadline = time.monotonic() + timeout_s
        answer = None
        while answer is None and time.monotonic() < deadline:
            time.sleep(0.05)
            answer = run.answer_to(name)
        if answer is None:
            typer.echo(f"hpc-elastic: no answer within {timeout_s:g} s: the job may be in a long step; the request stands", err=True)
            raise typer.Exit(EXIT_NO_ANSWER)
        if as_json:
            typer.echo(json.dumps({"accepted": answer.accepted, "text": answer.text}))
        else:
            typer.echo(f"{'accepted' if answer.accepted else 'refused'}: {answer.text}", err=not answer.accepted)
        if not answer.accepted:
            raise typer.Exit(EXIT_REFUSED)
        while done is not None and not done(_status(run)):
            if time.monotonic() > deadline:
                typer.echo(f"hpc-elastic: not done within {timeout_s:g} s", err=True)
                raise typer.Exit(EXIT_NO_ANSWER)
            time.sleep(0.05)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Probe this machine: which MPI, what it can do, how many slots, and what is missing.

    Example:

        hpc-elastic doctor
    """
    from .doctor import examine, table

    with _errors():
        checks = examine()
        if as_json:
            typer.echo(json.dumps([msgspec.to_builtins(check) for check in checks]))
        else:
            table(checks)
        if any(not check.good for check in checks if check.needed):
            raise typer.Exit(1)


@app.command()
def pack(
    sources: Annotated[list[Path], typer.Argument(help="An idx or idx.gz file, an npz file, or a folder of PNG/JPEG images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")],
    labels: Annotated[Optional[Path], typer.Option(help="idx file of labels.")] = None,  # noqa: UP045
    shards: Annotated[int, typer.Option(help="Number of shards.")] = 1,
    size: Annotated[Optional[str], typer.Option(help="Scale images to HEIGHTxWIDTH.")] = None,  # noqa: UP045
    gray: Annotated[bool, typer.Option("--gray", help="Make images gray.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are there.")] = False,
) -> None:
    """Make HDF5 shards from images.

    Examples:

        hpc-elastic pack train-images-idx3-ubyte.gz --labels train-labels-idx1-ubyte.gz --out data/train --shards 4

        hpc-elastic pack photos/ --size 224x224 --out data/photos
    """
    from .pack import pack as make
    from .progress import counting

    with _errors(), counting("packing") as advance:
        made = make(sources, out, labels=labels, shards=shards, size=_size(size), gray=gray, overwrite=overwrite, progress=advance)
    for path in made:
        typer.echo(path)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ConfigError(f"--size {text}: write HEIGHTxWIDTH, such as 224x224")
    return int(height), int(width)


@app.command()
def inspect(
    where: Annotated[list[str], typer.Argument(help="Shard files, a folder of them, or a pattern.")], as_json: Json = False
) -> None:
    """Print what a set of shards holds.

    Example:

        hpc-elastic inspect data/digits-upright/train
    """
    from .inspect import describe, table

    with _errors():
        found = describe(where)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            table(found)


@app.command()
def report(run: Run, as_json: Json = False) -> None:
    """Print what happened in a run: generations, ranks, stages, throughput.

    Example:

        hpc-elastic report runs/train-20300101-120000
    """
    from .report import summarize, table

    with _errors():
        summary = summarize(RunDirectory(run))
        if as_json:
            typer.echo(json.dumps(summary))
        else:
            table(summary)


def main() -> None:
    """Be the command."""
    app(prog_name="hpc-elastic")


if __name__ == "__main__":
    sys.exit(main())
