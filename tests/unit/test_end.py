"""The end of a process that has left a thread inside a call of MPI's: without ``MPI_Finalize``, which would crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, ctypes, threading, time
import mpi4py
mpi4py.rc.initialize = False
# In the place of mpi4py's own call of MPI_Finalize, which comes as late
ctypes.pythonapi.Py_AtExit(ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p))
from mpi4py import MPI
from hpc_elastic.comm import waiting, world
forsaken = threading.Thread(target=time.sleep, args=(60,), daemon=True)
forsaken.start()
waiting.forsake(forsaken)
atexit.register(world.at_exit)
print("the end")
{after}
"""


@pytest.mark.parametrize(("after", "code"), [("", 0), ("raise ValueError", 1)])
def test_mpi_imported_by_the_script_itself_is_not_finalized(after, code):
    command = [sys.executable, "-c", SCRIPT.format(after=after)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, "the end\n"), done.stderr
