"""What a supervisor begins with: a run directory, new or of a run to be resumed, and how the job is started in it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from . import leftovers, scripts
from .attempt import beats
from .comm.vendor import Vendor, find_mpiexec
from .config import Config, build, merge
from .errors import ConfigError, LaunchError, RunDirectoryError
from .events import EventLog
from .rundir import Answer, Launch, RunDirectory, Status

LOOK_S = 3.0  # ranks show a sign of life each second


class Prepared(NamedTuple):
    """A run that can be started, and with what; `lock` is the supervisor's."""

    run: RunDirectory
    launch: Launch
    lock: IO[bytes]
    mpiexec: Path
    vendor: Vendor


def new(script: str, arguments: list[str], given: dict[str, Any], *, module: bool) -> Prepared:
    """Make the run directory for a new run of `script`; see `Supervisor.start`."""
    config = build(given)
    scripts.check(script, Path.cwd(), module=module)
    mpiexec, vendor = find_mpiexec()
    launch = Launch(
        script=script,
        module=module,
        arguments=arguments,
        settings=_plain(config, given),
        directory=str(Path.cwd()),
        mpi=vendor.title,
    )
    if config.run_dir:
        run = RunDirectory.create(Path(config.run_dir))
    else:
        run = RunDirectory.create_below(Path("runs"), script.rsplit(".", 1)[-1] if module else Path(script).stem)
    with contextlib.ExitStack() as undo:
        undo.callback(run.remove_unused)
        with _writing(run):
            lock = undo.enter_context(run.lock())
            _configure(run, launch)
            run.put_launch(launch)
        undo.pop_all()
    return Prepared(run, launch, lock, mpiexec, vendor)


def again(run: RunDirectory, given: dict[str, Any]) -> Prepared:
    """Make `run` ready to be resumed, with `given` above its settings; see `Supervisor.resume`."""
    launch = run.launch()
    if launch is None:
        raise RunDirectoryError(f"{run.path} has no launch.json: only what `hpc-elastic run` started can be resumed")
    if "run_dir" in given:
        raise ConfigError("run_dir: a run is resumed where it is")
    settings = merge(launch.settings, given)
    mpiexec, vendor = find_mpiexec()
    launch = msgspec.structs.replace(launch, settings=_plain(build(settings), settings), mpi=vendor.title)
    if not Path(launch.directory).is_dir():
        raise LaunchError(f"the run's working directory {launch.directory} does not exist any more")
    scripts.check(launch.script, Path(launch.directory), module=launch.module)
    lock = run.lock()
    try:
        _take_over(run)
        with _writing(run):
            _configure(run, launch)  # launch.json has these settings when the job has come to run with them
            return Prepared(run, launch, lock, mpiexec, vendor)
    except BaseException:
        lock.close()
        raise


def _plain(config: Config, given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(config).items() if key in given}


@contextlib.contextmanager
def _writing(run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"run directory {run.path} can't be written: {error.strerror}; make room, or see to its permissions"
        raise RunDirectoryError(text) from error


def _configure(run: RunDirectory, launch: Launch) -> None:
    run.put(run.path / "config.json", launch.settings)


def _take_over(run: RunDirectory) -> None:
    """Put away what is left of a run without a supervisor."""
    status = run.status()
    if status is not None and status.state == "ended" and not run.failed():
        raise RunDirectoryError(f"the job in {run.path} has ended well: there is nothing to resume")
    away = sorted({record.member.host for record in run.records()} - {leftovers.HOST})
    if away and _alive(run):
        raise RunDirectoryError(f"ranks of {run.path} still run on {', '.join(away)}: end them there first")
    left = leftovers.remove(run.path, since=(run.path / "launch.json").stat().st_mtime)
    if left:
        raise RunDirectoryError(f"processes {left} of {run.path} can't be ended: end them first")
    run.retire_attempt()
    EventLog(run.events).mend()
    for name, _ in run.requests():
        run.answer(name, Answer(accepted=False, text="the run ended before this was read, and is resumed"))
    if status is not None:
        run.put_status(starting(status))


def starting(status: Status, title: str = "") -> Status:
    """Return the status of a job that goes on from where `status` says, and has no ranks yet."""
    now = {"state": "starting", "time": time.time(), "under_way": title}
    return msgspec.structs.replace(status, **now, ranks=0, members=(), parked=0, samples_per_s=0.0)


def _alive(run: RunDirectory) -> bool:
    before = beats(run.path / "ranks")
    time.sleep(LOOK_S)
    return beats(run.path / "ranks") != before
