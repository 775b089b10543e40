"""How a rank ends before its time: it leaves, it fails, or it is ended because it can't go on."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import msgspec

from .. import events
from ..comm.vendor import own_shared_memory, under_launcher
from ..comm.waiting import LeftOut
from ..errors import ElasticError, JobError, LostRank, RankError, RunDirectoryError
from ..model import Member
from ..processes import alive
from ..rundir import Failure
from ..streams import put

if TYPE_CHECKING:
    from ..comm.door import Door
    from .job import Job
    from .session import Session

LAST_WORDS_S = 3.0  # how long a rank that failed waits for the others to notice
EXIT_CALLED_OFF = 75  # of a newcomer that can't end MPI any more; not 0, so that its guard does that in its place

_by_hand = not under_launcher()  # asked now, since Open MPI sets such variables itself in MPI_Init


def retire(job: Job) -> None:
    """End this rank, which has left the job."""
    from ..comm.world import finalize

    session = job.session
    job.close()
    session.record(job.member, "retired")
    finalize()
    if _by_hand and job.member.id == 0:
        # A shell waits for this process, and what follows he.run in the script may still print on the others.
        others = [record.member.pid for record in session.run.records() if record.member.id != job.member.id]
        _await(lambda: not any(alive(pid) for pid in others), float("inf"))


def fail(job: Job, error: BaseException) -> None:
    """Record why the job failed, tell the others, and raise the same on every rank."""
    session = job.session
    job.over = True
    if isinstance(error, LeftOut):
        end_alone(job, str(error))
    rank, generation, step = job.where()
    member = job.member
    lost = isinstance(error, LostRank)
    own = not isinstance(error, RankError)
    if own and type(error).__module__.startswith("mpi4py"):
        # MPI noticed in a call of the user's own that another rank is gone.
        _await(lambda: session.run.failed() or job.membership.bereft(), LAST_WORDS_S)
        lost = job.membership.bereft()
    if isinstance(error, SystemExit):
        what = f"SystemExit: the script ended itself (code {error.code!r}) inside he.run"
    else:
        what = f"{type(error).__name__}: {error}"
    host = socket.gethostname()
    if rank >= 0:
        text = f"rank {rank} on {host} failed in generation {generation} at step {step}: {what}"
    else:
        text = f"newcomer {member.id} on {host} failed while {'joining' if job.membership.called else 'warming up'}: {what}"
    if not job.membership.entered:
        _newcomer_failed(job, text, error)
    first = False
    failure = None
    if own:
        trace = "" if isinstance(error, ElasticError) else "".join(traceback.format_exception(error))
        failure = _failure(job, text, trace, told=True, kind="lost" if lost else "error")
        first = _recorded(session, failure)
        if first:
            # Now, and once: a launcher that sees another rank end can end this one before its interpreter's end.
            put(sys.stderr, f"{trace}hpc_elastic: {text}\n")
    job.membership.abandon()
    _remove_shared_memory()
    message, kind = text, cast("type[JobError]", RankError)
    with contextlib.suppress(OSError, RunDirectoryError):
        known = session.run.failure() or failure or _failure(job, text)
        message, kind = known.error, LostRank if known.kind == "lost" else RankError
        session.record(member, "failed", message)
        _say_last_words(job)
        if job.leads:
            events.EventLog(session.run.events).write(
                events.Failed(error=message, rank=known.rank, host=known.host, generation=known.generation, step=known.step)
            )
            status = session.run.status()
            if status is not None:
                session.run.put_status(msgspec.structs.replace(status, state="failed", step=step, time=time.time()))
    be_quiet()
    _end_without_mpi()
    raise kind(message) from (error if first else None)


def _recorded(session: Session, failure: Failure) -> bool:
    """Record why the job failed; tell whether this rank has to say it, as the first one, or as nobody can read it."""
    try:
        return session.run.fail(failure)
    except FileNotFoundError:  # the run directory is gone
        return False
    except OSError:  # its disk is full
        return True


def _failure(job: Job, text: str, trace: str = "", *, told: bool = False, kind: str = "error") -> Failure:
    """Return a failure that happened here and now."""
    rank, generation, step = job.where()
    return Failure(
        error=text,
        traceback=trace,
        member=job.member.id,
        rank=rank,
        host=socket.gethostname(),
        generation=generation,
        step=step,
        told=told,
        kind=kind,
    )


def _remove_shared_memory() -> None:
    """Do what ``MPI_Finalize`` would do, which can't be called: it would wait for ranks that don't come."""
    for segment in own_shared_memory():
        segment.unlink(missing_ok=True)


def _newcomer_failed(job: Job, text: str, error: BaseException) -> None:
    """Let the job go on without this newcomer, unless it has failed as a whole."""
    session, membership = job.session, job.membership
    if not isinstance(error, (Exception, SystemExit)) or membership.door is None or session.run.failed():
        return
    if not isinstance(error, LostRank):
        put(sys.stderr, "".join(traceback.format_exception(error)))
    # Members that wait for this one must not take it for one that left by itself.
    session.record(job.member, "failed" if membership.called else "cancelled", text)
    if not membership.called and not isinstance(error, LostRank):
        turn_back(membership.door, job.member, text)
    membership.vigil.close()
    _remove_shared_memory()
    sys.stdout.flush()
    os._exit(EXIT_CALLED_OFF)  # MPI_Finalize would wait for those that it was connected with


def turn_back(door: Door, member: Member, why: str) -> None:
    """Tell the leader why this newcomer can't come, and end. It is no part of the job yet, so this is no failure of it."""
    from ..comm.messages import Report

    door.report(Report(member=member, error=why))
    raise SystemExit(0)


def _say_last_words(job: Job) -> None:
    """Wait, for a short time, until the other ranks have noticed as well: the first to go can take the launcher with it."""
    session, world = job.session, job.membership.world
    if world is None:
        return
    here = socket.gethostname()

    def noticed(member: Member) -> bool:
        record = session.run.record(member.id)
        gone = member.host == here and not alive(member.pid)
        return gone or (record is not None and record.outcome == "failed")

    _await(lambda: all(noticed(member) for member in world.generation.members), LAST_WORDS_S)


def watch_for_failure(job: Job) -> None:
    """End this process when it can't end by itself: it may be inside a call of MPI's that can't be left."""
    session = job.session

    def failed() -> None:
        time.sleep(LAST_WORDS_S / 2)  # what other ranks wait for; most have noticed by then, and unwind
        if not job.over and job.membership.entered:
            with contextlib.suppress(OSError, ElasticError):
                known = session.run.failure()
                session.record(job.member, "failed", known.error if known else "the run directory is gone")
            _remove_shared_memory()
            os._exit(1)

    def ends(reason: str) -> None:
        end_alone(job, reason)

    job.membership.vigil.start(ends, failed)


def end_alone(job: Job, reason: str) -> NoReturn:
    """End this process, which is a lost rank to the others from now on: they judge what becomes of the job."""
    put(sys.stderr, f"hpc_elastic: process {job.member.id} ends itself: {reason}\n")
    with contextlib.suppress(OSError, ElasticError):
        job.session.record(job.member, "failed", reason)
    _remove_shared_memory()
    os._exit(EXIT_CALLED_OFF)


def _await(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


def print_only_the_message() -> None:
    """Print this package's errors without a traceback: their messages say what to do."""

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        if isinstance(value, ElasticError):
            put(sys.stderr, f"hpc_elastic: {value}\n")
        else:
            sys.__excepthook__(kind, value, trace)

    sys.excepthook = hook


def be_quiet() -> None:
    """Print no traceback in this process: another rank prints the one there is."""

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        if not isinstance(value, ElasticError):
            sys.__excepthook__(kind, value, trace)

    sys.excepthook = hook


def _end_without_mpi() -> None:
    """At the interpreter's end, leave without ``MPI_Finalize``, which would wait for ranks that don't come."""
    from ..comm import world

    atexit.unregister(world.at_exit)

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(leave)
