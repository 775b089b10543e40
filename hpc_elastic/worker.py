"""What a newcomer runs: receive the options, then run the user's script, which joins the job where its loop begins.

python -m hpc_elastic.worker RUN MEMBER
"""

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

import mpi4py

# A newcomer becomes an MPI process when it is ready; the user's own import of MPI must not make it one before.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False

from .comm.door import Door  # noqa: E402
from .comm.messages import Options, options_file  # noqa: E402
from .comm.waiting import Watch  # noqa: E402
from .config import DOOR_VARIABLE, START_VARIABLE  # noqa: E402
from .errors import Retired  # noqa: E402
from .model import Member  # noqa: E402
from .rundir import RunDirectory  # noqa: E402
from .runtime.failing import turn_back  # noqa: E402
from .runtime.launch import be_newcomer, has_run, print_whole_lines  # noqa: E402
from .runtime.session import Script, Session, unpacked  # noqa: E402


def main() -> None:
    """Be a newcomer."""
    faulthandler.register(signal.SIGQUIT)
    print_whole_lines()
    if len(sys.argv) != 3 or DOOR_VARIABLE not in os.environ:  # noqa: PLR2004
        sys.exit("hpc_elastic.worker is started by the job itself, not by hand")
    run, number = RunDirectory(Path(sys.argv[1])), int(sys.argv[2])
    options = run.get(options_file(run, number), Options)
    assert options is not None
    member = Member(id=number, pid=os.getpid(), host=socket.gethostname(), slot=options.slot)
    script = Script(options.argv, options.module, options.path, options.directory)
    began, how = os.environ.pop(START_VARIABLE).split(" ", 1)
    session = Session(unpacked(options.settings), run, script, options.started, how=how, start_s=time.time() - float(began))
    gifts = int(os.environ.pop(DOOR_VARIABLE))
    door = Door(run, number, Watch(session.check), gifts, leader=(options.leader,), launcher=options.launcher)
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
        raise
    except BaseException as error:
        if has_run():
            raise
        traceback.print_exception(error)
        why = f"{script.name} failed before he.run: {type(error).__name__}: {error}"
    if not has_run():
        turn_back(door, member, why)


if __name__ == "__main__":
    main()
