"""Ranks are lost in jobs whose state is on all of them: those that are left begin again, in the same processes."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.config import FAULT_VARIABLE

from ..afterwards import happened
from ..launch import SCRIPTS, Job, hpc_elastic, until
from ..rarely import also
from .test_losses import killed, pids, under_way

SIZE, TURNS, PAUSE_S = 65, 150, 0.02
SETTINGS = {"stall_s": 4, "deadline_s": 20, "checkpoint_steps": 20, "copy_s": 0.2}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    with Job(hpc_elastic("run", "--run-dir", "r", SCRIPTS / "plate.py", SIZE, TURNS, 0), folder=folder) as job:
        return job.wait().value("sha256")


@pytest.fixture
def start(tmp_path):
    def begin(*, ranks=3, fault="", script=SCRIPTS / "plate.py", **settings):
        pairs = [part for name, value in {**SETTINGS, **settings}.items() for part in ("--set", f"{name}={value}")]
        options = ["--run-dir", "r", "--ranks", ranks, "--slots", 5, "--hold"]
        command = hpc_elastic("run", *options, *pairs, script, SIZE, TURNS, PAUSE_S)
        return Job(command, folder=tmp_path, environ={FAULT_VARIABLE: fault} if fault else {})

    return begin


def kill(run, *ranks):
    """Kill them as one loss: none goes on meanwhile."""
    found = pids(run, ranks)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in found:
            os.kill(pid, number)


def copied(path, ranks):
    """Return the run when `ranks` ranks have done some turns together, and so have copies."""
    run = under_way(path, ranks)
    reached = run.status().step
    until(lambda: run.status().step > reached + 3)
    return run


@pytest.mark.parametrize("rank", [0, 2, also(1)])
def test_from_memory(rank, start, static, tmp_path):
    with start(checkpoint_steps=0) as job:
        run = copied(tmp_path / "r", 3)
        kill(run, rank)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (again,) = happened(run.path, events.Rewound)
    assert (again.source, again.ranks) == ("memory", 2)
    assert 0 < again.step <= again.before
    assert "3 -> 2 ranks\n" in done.err
    assert f"the 2 ranks that are left begin again at step {again.step}, from memory" in done.err
    assert not happened(run.path, events.Restarted)
    assert any("replaces what was lost" in event.reason for event in happened(run.path, events.Decided))


@pytest.mark.parametrize("recovery", ["memory", "checkpoint"])
def test_neighbours_are_lost(recovery, start, static, tmp_path):
    """What both held is in the last checkpoint only."""
    with start(ranks=4, recovery=recovery) as job:
        run = copied(tmp_path / "r", 4)
        until(lambda: happened(run.path, events.Checkpointed))
        kill(run, 1, 2)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    again = happened(run.path, events.Rewound)
    assert all("checkpoints" in event.source for event in again if event.ranks == 2)
    assert again[-1].ranks == 2
    assert not happened(run.path, events.Restarted)


def test_a_checkpoint_that_is_newer_than_the_copies(start, static, tmp_path):
    """Fewer turns are done again."""
    with start(copy_s=1000, checkpoint_steps=10) as job:
        run = copied(tmp_path / "r", 3)
        until(lambda: happened(run.path, events.Checkpointed))
        kill(run, 1)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (again,) = happened(run.path, events.Rewound)
    assert "checkpoints" in again.source
    assert again.step >= happened(run.path, events.Checkpointed)[0].step


def test_resume_from_a_full_disk(start, static, small_disk, tmp_path):
    """It begins with the last checkpoint for which there was room, and leaves nothing of the others."""
    subprocess.run(["mount", "-o", "remount,size=150k", small_disk], check=True)
    with start(ranks=2, checkpoint_dir=small_disk, checkpoint_steps=10) as job:
        run = under_way(tmp_path / "r", 2)
        until(lambda: any(event.error for event in happened(run.path, events.Checkpointed)))
        killed(job, run)
    made = happened(run.path, events.Checkpointed)
    good = [event.path for event in made if not event.error]
    assert good
    assert all("the disk is full: free space" in event.error for event in made if event.error)
    with Job(hpc_elastic("resume", "r", "--ranks", 3), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (resumed,) = happened(run.path, events.Resumed)
    assert resumed.path == good[-1]
    assert sorted(str(path) for path in (small_disk / "r").iterdir()) == good


def test_a_part_that_comes_too_late_is_removed(start, static, tmp_path):
    """The leader has given the checkpoint up by then, for want of room, and there is no other one."""
    fault = "snapshot:delay=1:rank=1;write:disk-full:role=leader"
    with start(ranks=2, fault=fault, checkpoint_steps=200, checkpoint_dir=tmp_path / "c") as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    assert "failed, the job goes on: checkpoint 01-000000100 was not written" in done.err
    assert list((tmp_path / "c").glob("r/.*")) == []


def test_no_checkpoint_yet(start, static, tmp_path):
    """Then it is the start."""
    with start(recovery="checkpoint", checkpoint_steps=0) as job:
        run = copied(tmp_path / "r", 3)
        kill(run, 1)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (again,) = happened(run.path, events.Rewound)
    assert (again.source, again.step) == ("the start", 0)


@pytest.mark.parametrize(
    "fault",
    [
        also("copy:kill:rank=1:gen=1"),
        "copy:kill:role=leader:gen=1",
        "copy:stop:rank=2:gen=1",
        "point:kill:rank=1:step=60;restore:kill:rank=1",
        also("point:kill:rank=1:step=60;rebuild:kill:rank=1"),
        "point:kill:rank=2:step=60;restore:kill:role=leader",
        "redistribute:kill:gen=1:rank=1",
        also("commit:kill:gen=1:rank=0"),
    ],
)
def test_faults(fault, start, static, tmp_path):
    """While copies are made, while the others begin again, while a resize moves rows."""
    with start(fault=fault, timetable="3:3,90:4", policy="timetable", ranks=1) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    happenings = [path.name for path in (tmp_path / "r" / "faults").iterdir()]
    assert "0" in happenings
    assert happened(tmp_path / "r", events.Rewound) or happened(tmp_path / "r", events.Restarted)


def test_before_newcomers_have_copies(start, static, tmp_path):
    """The copies of the generation before serve, and the newcomer gets the state from the others."""
    fault = "copy:kill:rank=1:gen=2"
    with start(fault=fault, timetable="3:3,90:4", policy="timetable", ranks=1, checkpoint_steps=0) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (again,) = happened(tmp_path / "r", events.Rewound)
    assert (again.source, again.ranks) == ("memory", 3)
    assert not happened(tmp_path / "r", events.Restarted)


LOOP = """
import sys, time
import numpy as np
import hpc_elastic as he

def train(job):
    x, own = np.zeros(3), 0
    job.register(x=x)
    for turn in job.loop(int(sys.argv[2])):
        x += turn
        own += 1
        {deed}
        time.sleep(float(sys.argv[3]))  # stands for a computation, in which ranks are killed
    if job.leads:
        print("sha256", int(x[0]), flush=True)

if __name__ == "__main__":
    he.run(train)
"""


def test_a_loop_without_arrays(start, tmp_path):
    """The function is entered again, and its registered state is put back."""
    (tmp_path / "loop.py").write_text(LOOP.format(deed="pass"))
    with start(script="loop.py", checkpoint_steps=0) as job:
        run = copied(tmp_path / "r", 3)
        kill(run, 0)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == str(sum(range(TURNS)))
    (again,) = happened(run.path, events.Rewound)
    assert again.source == "memory"


def test_in_a_call_of_the_users_own(start, tmp_path):
    """Open MPI ends the call, and the job begins again in place. On MPICH nothing can: ranks in it end themselves."""
    (tmp_path / "loop.py").write_text(LOOP.format(deed="job.comm.barrier()"))
    with start(script="loop.py") as job:
        run = copied(tmp_path / "r", 3)
        kill(run, 1)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == str(sum(range(TURNS)))
    if find_mpiexec()[1].shrinks:
        assert happened(run.path, events.Rewound)
    else:  # unless all were between two calls
        assert happened(run.path, events.Restarted) or happened(run.path, events.Rewound)


def test_restart_if_that_is_wanted(start, static, tmp_path):
    with start(recovery="restart") as job:
        run = copied(tmp_path / "r", 3)
        kill(run, 1)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    (event,) = happened(run.path, events.Restarted)
    assert "process 1" in event.reason
    assert not happened(run.path, events.Rewound)
