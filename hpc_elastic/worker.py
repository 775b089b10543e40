"""What a newcomer runs: initialise MPI, receive the options, then run the user's script."""

from __future__ import annotations

import faulthandler
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """Be a newcomer."""
    from .runtime.launch import be_newcomer, has_run, import_mpi, retire_on_sigterm, turn_back

    begun = time.perf_counter()
    faulthandler.register(signal.SIGQUIT)
    import_mpi()
    from .comm.arrival import Door, Report
    from .comm.waiting import Watch
    from .comm.world import finalize
    from .errors import Retired
    from .model import Member
    from .rundir import RunDirectory
    from .runtime.session import Script, Session, unpacked

    door = Door.spawned()
    if door is None:
        sys.exit("hpc_elastic.worker is started by the job itself, not by hand")
    retire_on_sigterm()
    options = door.options()
    member = Member(id=options.member, pid=os.getpid(), host=socket.gethostname(), slot=options.slot)
    door.report(Report(member=member, stages={"init": time.perf_counter() - begun}))
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
