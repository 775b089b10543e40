"""The commands that look at what is there, and change nothing: `verify`, `inspect`, `report`, `tensorboard`."""
# ruff: noqa: D301 - each command imports what it needs, so that the others start fast; \b is click's

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .control import EXIT_DATA, Json, Run, errors, fail
from .rundir import RunDirectory


def verify(
    where: Annotated[Path, typer.Argument(metavar="WHERE", help="Run directory, or a checkpoint.")],
    as_json: Json = False,
) -> None:
    """Read the checkpoints of a run, or one, and compare them with their checksums. Ends with 7 if one is bad or none there.

    \b
    Examples:
      hpc-elastic verify runs/train-20300101-120000
      hpc-elastic verify runs/train-20300101-120000/checkpoints/00-000001200 --json
    """
    from .verify import examine, table

    with errors():
        found = examine(where)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            table(found)
        if not found:
            fail(f"{where} has no checkpoints", EXIT_DATA)
        if any(row["problems"] for row in found):
            raise typer.Exit(EXIT_DATA)


def inspect(
    where: Annotated[list[str], typer.Argument(metavar="WHERE", help="Shard files, a folder of them, or a pattern.")],
    as_json: Json = False,
) -> None:
    """Print what a set of shards holds.

    \b
    Examples:
      hpc-elastic inspect data/digits-upright/train
      hpc-elastic inspect 'data/*/test/*.h5' --json
    """
    from .inspect import describe, table

    with errors():
        found = describe(where)
        if as_json:
            typer.echo(json.dumps(found))
        else:
            table(found)


def report(
    run: Run,
    as_json: Json = False,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it instead: learning curve and ranks, as SVG.")
    ] = None,
) -> None:
    """Print what happened in a run: generations, what each resize cost, pace, newcomers, losses, restarts, checkpoints.

    \b
    Examples:
      hpc-elastic report runs/train-20300101-120000
      hpc-elastic report runs/train-20300101-120000 --svg run.svg
    """
    from .report import table
    from .summary import summarize

    with errors():
        directory = RunDirectory(run)
        if svg is not None:
            from .picture import draw

            draw(directory, svg)
        summary = summarize(directory) if as_json or svg is None else None
        if as_json:
            typer.echo(json.dumps(summary))
        elif summary is not None:
            table(summary)


def tensorboard(
    run: Run,
    folder: Annotated[Path | None, typer.Option("--log-dir", help="Folder; by default tensorboard/ in RUN.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Write what there is, and end.")] = False,
) -> None:
    """Write the log of a run that TensorBoard shows, and go on for as long as the run does.

    It is one log, whichever rank leads and however often the job is started again. TensorBoard shows it with
    `tensorboard --logdir RUN`.

    \b
    Example:
      hpc-elastic tensorboard runs/train-20300101-120000
    """
    from .tensorboard import write

    with errors():
        directory = RunDirectory(run)
        folder = folder or directory.tensorboard
        typer.echo(f"for: tensorboard --logdir {folder}", err=True)
        typer.echo(write(directory, folder, follow=not once))
