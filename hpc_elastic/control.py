"""What the commands share that look at a run or ask it for something: exit codes, a request and its answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from . import events
from .errors import CheckpointError, ConfigError, ElasticError, LaunchError, RunDirectoryError, ShardError
from .model import Request
from .rundir import Answer, RunDirectory, Status
from .standing import LIVE, silence, status_of

EXIT_FAILED, EXIT_USAGE, EXIT_NO_RUN, EXIT_REFUSED, EXIT_NO_ANSWER, EXIT_DATA = 1, 2, 4, 5, 6, 7
CODES = {
    ConfigError: EXIT_USAGE,
    LaunchError: EXIT_USAGE,
    RunDirectoryError: EXIT_NO_RUN,
    ShardError: EXIT_DATA,
    CheckpointError: EXIT_DATA,
}
LOOK_S = 0.05

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, as `hpc-elastic run` made it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

Done = Callable[[Status], bool]


@contextmanager
def errors(codes: dict[type[ElasticError], int] = CODES) -> Iterator[None]:
    """Turn the project's errors into a message and an exit code."""
    try:
        yield
    except ElasticError as error:
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILED)
        fail(str(error), code)
    except PermissionError as error:
        fail(f"{error.filename} may not be read by this user: {error.strerror}", EXIT_NO_RUN)
    except BrokenPipeError:  # whoever reads has had enough
        os._exit(0)
    except OSError as error:
        fail(f"{error.filename or 'a file'}: {error.strerror}", EXIT_NO_RUN)


def fail(message: str, code: int) -> NoReturn:
    """End the program."""
    typer.echo(f"hpc-elastic: {message}", err=True)
    raise typer.Exit(code) from None


# --- requests ---------------------------------------------------------------------------------------------------------


def ask(
    path: Path, request: Request, timeout_s: float, *, as_json: bool, what: str, wait: Callable[[RunDirectory], Done] | None
) -> None:
    """Ask the job in `path` for something and print the answer; wait until it is done if `wait` returns how to see that."""
    run = RunDirectory(path)
    found = status_of(run)
    if found.state not in LIVE:
        raise RunDirectoryError(f"the job in {path} is not running: it has {found.state}")
    done = wait(run) if wait else lambda _: True
    deadline = time.monotonic() + timeout_s
    answer = _answer(run, run.ask(request), found, timeout_s)
    if as_json:
        typer.echo(msgspec.json.encode(answer).decode())
    else:
        typer.echo(f"{'accepted' if answer.accepted else 'refused'}: {answer.text}", err=not answer.accepted)
    if not answer.accepted:
        raise typer.Exit(EXIT_REFUSED)
    while not done(now := status_of(run)):
        if now.state not in LIVE:
            raise RunDirectoryError(f"the job in {path} has {now.state} before the {what} was done")
        if time.monotonic() >= deadline:
            fail(f"not done within {timeout_s:g} s, but still under way", EXIT_NO_ANSWER)
        time.sleep(LOOK_S)


def _answer(run: RunDirectory, name: str, found: Status, timeout_s: float) -> Answer:
    deadline = time.monotonic() + timeout_s
    while (answer := run.answer_to(name)) is None:
        if time.monotonic() >= deadline:
            why = silence(found).lstrip("; ") or "the job may be in a long step"
            fail(f"no answer within {timeout_s:g} s: {why}; the request stands", EXIT_NO_ANSWER)
        time.sleep(LOOK_S)
    return answer


def resized(run: RunDirectory, ranks: int) -> Done:
    """Return what tells that the job has as many ranks; it ends the program if the resize is given up."""

    def refusals() -> list[str]:
        found = (event for event in events.read(run.events) if isinstance(event, events.Refused))
        return [event.reason for event in found if event.ranks == ranks]

    before = len(refusals())

    def done(now: Status) -> bool:
        if now.ranks != ranks and now.state in LIVE and len(found := refusals()) > before:
            fail(f"the resize was given up: {found[-1]}", EXIT_REFUSED)
        return now.ranks == ranks

    return done


def checkpointed(run: RunDirectory) -> Done:
    """Return what tells that there is a checkpoint of now or later; it ends the program if that can't be written."""

    def checkpoints() -> list[events.Checkpointed]:
        return [event for event in events.read(run.events) if isinstance(event, events.Checkpointed)]

    before, step = checkpoints(), status_of(run).step
    loop = before[-1].loop if before else 1

    def done(_: Status) -> bool:
        # One that was being written when this one was asked for is of an earlier step.
        new = [event for event in checkpoints()[len(before) :] if event.loop > loop or event.step >= step]
        if new and new[0].error:
            fail(f"the checkpoint failed: {new[0].error}", EXIT_FAILED)
        return bool(new)

    return done


def ended(_: RunDirectory) -> Done:
    """Return what tells that the job has ended."""
    return lambda now: now.state not in LIVE
