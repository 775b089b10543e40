"""What is said of a newcomer that can't be connected with. The bridge and the guard are stand-ins: no MPI is initialised."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import pathlib, sys, threading, time
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from types import SimpleNamespace as Fake
from hpc_elastic.comm import arrival
from hpc_elastic.rundir import End, RunDirectory

case, path = sys.argv[1:]
run = RunDirectory.create(pathlib.Path(path))
ended = threading.Event()
arrival.GUARDS_WORD_S = 60 if case != "alive" else 0.2


class Guard:
    def poll(self):
        return 0 if ended.is_set() else None

    def terminate(self):
        print("ended")


class Bridge:
    def connect(self, run, member):
        if case == "dies":
            threading.Timer(0.3, die).start()
        raise MPI.Exception(MPI.ERR_SPAWN)


class Thread(threading.Thread):
    def start(self):
        name = self._target.__name__
        if case in ("no thread", "no second thread") and name == {"no thread": "_bring", "no second thread": "_limit"}[case]:
            raise RuntimeError("can't start new thread")
        super().start()


def die():
    end = End(member=1, pid=1, host="here", code=0, signal=9, time=0.0, peak_bytes=0, last_words="")
    run.put(run.path / "ranks" / "1.end.json", end)
    ended.set()


arrival.threading.Thread = Thread
arrivals = arrival.Arrivals(run, Bridge(), Fake(stalled=lambda member: False), time.monotonic)
arrivals.all.append(arrival.Arrival(Fake(member=1), guard=Guard()))
arrivals.bring()
if case == "called off":
    time.sleep(0.1)
    arrivals.dismiss(10.0)
until = time.monotonic() + 20
while not arrivals.problem() and time.monotonic() < until and case != "called off":
    time.sleep(0.01)
problem = arrivals.problem()
if arrivals._bringing is not None:
    arrivals._bringing.join(10)  # by which it is sent home
print(problem)
"""
NOT_CONNECTED = "newcomer 1 could not be connected: "


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("dies", "newcomer 1 was killed by signal 9 before it had joined"),
        ("alive", NOT_CONNECTED),
        ("called off", NOT_CONNECTED),
        ("no thread", "the newcomers could not be connected: no more processes or threads can be had"),
        ("no second thread", NOT_CONNECTED + "no more processes or threads can be had"),
    ],
)
def test_connecting_fails(case, said, tmp_path):
    """Who has died is said to have died, though the call fails before the guard says so; nobody is waited for in vain."""
    command = [sys.executable, "-c", SCRIPT, case, str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    *sent_home, problem = done.stdout.splitlines()
    assert problem.startswith(said)
    assert sent_home == ([] if case == "no thread" else ["ended"]), "by its guard, which may have ended as well"
