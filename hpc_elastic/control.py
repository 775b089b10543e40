"""What the commands share that look at a run or ask it for something: exit codes, its status, a request and its answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer

from . import events
from .broker.slurm import leases
from .errors import CheckpointError, ConfigError, ElasticError, LaunchError, RunDirectoryError, ShardError
from .model import Request
from .rundir import Answer, RunDirectory, Status

EXIT_FAILED, EXIT_USAGE, EXIT_NO_RUN, EXIT_REFUSED, EXIT_NO_ANSWER, EXIT_DATA = 1, 2, 4, 5, 6, 7
CODES = {
    ConfigError: EXIT_USAGE,
    LaunchError: EXIT_USAGE,
    RunDirectoryError: EXIT_NO_RUN,
    ShardError: EXIT_DATA,
    CheckpointError: EXIT_DATA,
}
LIVE = ("starting", "running")
STALE_S = 30.0
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


# --- how a run stands -------------------------------------------------------------------------------------------------


def status_of(run: RunDirectory) -> Status:
    """Return the status of `run`. A job killed from outside could not say so itself, but others have.

    A job that is over has no members, and the time is that of its end.
    """
    found, failure = run.status(), run.failure()
    if found is None:
        why = failure.error if failure else "the job has not reached its first step"
        raise RunDirectoryError(f"{run.path} has no status yet: {why}")
    if failure is not None:
        found = msgspec.structs.replace(found, state="failed", time=failure.time)
    return found if found.state in LIVE else msgspec.structs.replace(found, members=(), under_way="")


def silence(status: Status) -> str:
    """Return a remark on a job that should say something and does not."""
    age = time.time() - status.time
    return f"; the last sign of life is {age:.0f} s old" if status.state in LIVE and age > STALE_S else ""


def standing(status: Status) -> str:
    """Return the state of a job, and if it is over since when, by this host's clock."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.time))
    return status.state if status.state in LIVE else f"{status.state} at {when}"


def past(run: RunDirectory) -> dict[str, Any]:
    """Return the companions and the last checkpoint of `run`, why the last one failed, its restarts; None for none."""
    happened = events.read(run.events)
    tried = [event for event in happened if isinstance(event, events.Checkpointed)]
    good = [event for event in tried if not event.error]
    return {
        "checkpoint": msgspec.structs.asdict(good[-1]) if good else None,
        "checkpoint_error": tried[-1].error if tried and tried[-1].error else None,
        "restarts": [msgspec.structs.asdict(event) for event in happened if isinstance(event, events.Restarted)],
        "companions": leases.found(run.path),
    }


def remarks(found: dict[str, Any]) -> list[str]:
    """Return what `past` found, in lines for people."""
    lines = leases.lines(found["companions"])
    if found["checkpoint"]:
        age = time.time() - found["checkpoint"]["time"]
        lines.append(f"last checkpoint: step {found['checkpoint']['step']}, {age:.0f} s ago")
    if found["checkpoint_error"]:
        lines.append(f"a newer checkpoint failed: {found['checkpoint_error']}")
    if found["restarts"]:
        last = found["restarts"][-1]
        place = f"step {last['step']}" if last["step"] >= 0 else "no step"
        lines.append(f"restarts: {len(found['restarts'])}, the last after {place}: {last['reason']}")
    return lines


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
