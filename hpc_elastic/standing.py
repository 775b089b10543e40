"""How a run stands, from outside, so that a job tells also when it can't say so itself."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from . import events
from .attempt import beats
from .broker.slurm import leases
from .comm.liveness import alive
from .errors import RunDirectoryError
from .leftovers import HOST
from .rundir import Failure, RunDirectory, Status

LIVE = ("starting", "running")
STALE_S = 30.0
SILENT_S = 5.0  # ranks show a sign of life each second


def failure_of(run: RunDirectory) -> Failure | None:
    """Return why `run` failed, also if nobody was left to say so; None if it has not, as far as this host can see."""
    failure = run.failure()
    if failure is not None:
        return failure
    found = run.status()
    if found is None or found.state not in LIVE or not found.members:
        return None
    if any(member.host != HOST or alive(member.pid) for member in found.members):
        return None
    last = max([*beats(run.path / "ranks").values(), round(found.time * 1e9)]) / 1e9
    if time.time() - last < SILENT_S or run.is_supervised():  # who will say what is to be said
        return None
    why = "its processes are gone, and none of them could say why: killed from outside, most likely"
    return Failure(
        error=why, traceback="", member=-1, rank=-1, host=HOST, generation=-1, step=found.step, kind="lost", time=last
    )


def status_of(run: RunDirectory) -> Status:
    """Return the status of `run`. A job killed from outside could not say so itself, but others have.

    A job that is over has no members, and the time is that of its end.
    """
    found, failure = run.status(), failure_of(run)
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
