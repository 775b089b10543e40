"""What a newcomer runs: initialise MPI first of all, receive the options, then run the user's script."""

from __future__ import annotations

import time

BEGUN = time.perf_counter()

import mpi4py  # noqa: E402

mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402, F401  (before anything else: the leader's spawn lasts until this is done)

INIT_S = time.perf_counter() - BEGUN

import faulthandler  # noqa: E402
import os  # noqa: E402
import runpy  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from .comm.arrival import Door, Report  # noqa: E402
from .comm.waiting import Watch  # noqa: E402
from .comm.world import finalize  # noqa: E402
from .errors import Retired  # noqa: E402
from .model import Member  # noqa: E402
from .rundir import RunDirectory  # noqa: E402
from .runtime.launch import be_newcomer, has_run, retire_on_sigterm, turn_back  # noqa: E402
from .runtime.session import Script, Session, unpacked  # noqa: E402


def main() -> None:
    """Be a newcomer."""
    faulthandler.register(signal.SIGQUIT)
    door = Door.spawned()
    if door is None:
        sys.exit("hpc_elastic.worker is started by the job itself, not by hand")
    retire_on_sigterm()
    options = door.options()
    member = Member(id=options.member, pid=os.getpid(), host=socket.gethostname(), slot=options.slot)
    door.report(Report(member=member, stages={"init": INIT_S}))
    script = Script(options.argv, options.module, options.path, options.directory)
    session = Session(unpacked(options.settings), RunDirectory(Path(options.run_dir)), script, options.started)
    door.watch(Watch(session.check))
    be_newcomer(door, session, member)
    os.chdir(options.directory)
    sys.path[:] = options.path
    sys.argv[:] = options.argv
    why = f"{script.name} ended without calling he.run"
    try:
        if options.module:
            runpy.run_module(options.module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(options.argv[0], run_name="__main__")
    except Retired:
        door.close()
        finalize()
        return
    except BaseException as error:
        if has_run():
            raise
        traceback.print_exception(error)
        why = f"{script.name} failed before he.run: {type(error).__name__}: {error}"
    if not has_run():
        turn_back(door, member, why)


if __name__ == "__main__":
    main()
