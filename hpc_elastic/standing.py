"""How a run stands, from outside, so that a job tells also when it can't say so itself."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from . import events
from .attempt import beats
from .broker.slurm import leases
from .errors import RunDirectoryError
from .leftovers import HOST
from .processes import age_s, alive
from .rundir import Failure, RunDirectory, Status

LIVE = ("starting", "running")
STALE_S = 30.0
SILENT_S = 5.0  # ranks show four signs of life a second


def look(run: RunDirectory) -> tuple[Status | None, Failure | None]:
    """Return the status of `run` and why it failed, also if nobody was left to say so; as far as this host can see."""
    status, failure = run.status(), run.failure()
    return status, failure or (_abandoned(run, status) if status is not None else None)


def _abandoned(run: RunDirectory, status: Status) -> Failure | None:
    """Return the failure of a job whose processes, all of this host, are gone without a word; None if there are some."""
    if status.state not in LIVE or not status.members:
        return None
    silent_s = time.time() - status.time
    for member in status.members:
        # Whoever has begun since then is another process with that number, as after the machine was started anew.
        if member.host != HOST or (alive(member.pid) and age_s(member.pid) > silent_s - SILENT_S):
            return None
    # Files' times may be by another clock, but the status has this one's: at worst it is found out later.
    last = max([*beats(run.path / "ranks").values(), round(status.time * 1e9)]) / 1e9
    if time.time() - last < SILENT_S or run.is_supervised():  # by who will say what is to be said
        return None
    why = "its processes are gone, and none of them could say why: killed from outside, most likely"
    return Failure(
        error=why, traceback="", member=-1, rank=-1, host=HOST, generation=-1, step=status.step, kind="lost", time=last
    )


def stand(run: RunDirectory) -> tuple[Status, Failure | None]:
    """Return the status of `run`, and why it failed.

    A job that is over has no members, and the time is that of its end.

    Raises
    ------
    RunDirectoryError
        If it has no status yet.
    """
    found, failure = look(run)
    if found is None:
        why = failure.error if failure else "the job has not reached its first step"
        raise RunDirectoryError(f"{run.path} has no status yet: {why}")
    if failure is not None:
        found = msgspec.structs.replace(found, state="failed", time=failure.time)
    return found if found.state in LIVE else msgspec.structs.replace(found, members=(), under_way=""), failure


def status_of(run: RunDirectory) -> Status:
    """Return the status of `run`; see `stand`."""
    return stand(run)[0]


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
