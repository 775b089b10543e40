"""Jobs that are lost as a whole, stopped or killed: they go on from their last checkpoint, and come to the same result."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from hpc_elastic import events, leftovers
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.rundir import RunDirectory

from ..launch import Job, hpc_elastic, until

TURNS, EVERY = 160, 20
SCRIPT = """
import sys, time
import numpy as np
import hpc_elastic as he

def train(job):
    x = np.zeros(3)
    job.register(x=x)
    for turn in job.loop(int(sys.argv[1])):
        x += turn
        time.sleep(0.01)
    if job.leads:
        print("sum", int(x[0]), flush=True)

if __name__ == "__main__":
    he.run(train)
"""
SUM = str(sum(range(TURNS)))


@pytest.fixture
def start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def begin(*options):
        settings = ["--run-dir", "r", "--slots", 2, "--ranks", 2, "--set", f"checkpoint_steps={EVERY}", *options]
        return Job(hpc_elastic("run", *settings, "script.py", TURNS), folder=tmp_path)

    return begin


def under_way(path):
    """Return the run when it has two ranks and a checkpoint."""
    until((path / "status.json").exists)
    run = RunDirectory(path)
    until(lambda: run.status().ranks == 2 and any(isinstance(e, events.Checkpointed) for e in events.read(run.events)))
    return run


def signal_all(run, number):
    for record in run.records():
        if record.outcome == "member":
            os.kill(record.member.pid, number)


def resumed(run):
    (event,) = [event for event in events.read(run.events) if isinstance(event, events.Resumed)]
    assert event.step % EVERY == 0
    return event


@pytest.mark.parametrize(("number", "options"), [(signal.SIGKILL, ()), (signal.SIGSTOP, ("--set", "stall_s=1"))])
def test_all_ranks_at_once(number, options, start, tmp_path):
    """Nobody is left who could go on without the others."""
    with start(*options) as job:
        run = under_way(tmp_path / "r")
        signal_all(run, number)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sum") == SUM
    (event,) = [event for event in events.read(run.events) if isinstance(event, events.Restarted)]
    assert event.attempt == 2
    assert resumed(run).step <= event.step + 1
    assert run.status().state == "ended"


@pytest.mark.parametrize("names", [("hydra_pmi_proxy",), ("mpiexec.hydra", "mpiexec"), ("hydra_pmi_proxy", "mpiexec")])
def test_launcher_in_pieces(names, start, tmp_path):
    """A launcher that has lost the process it works through would stay for ever, and files of it if it is killed."""
    if not find_mpiexec()[1].proxied:
        pytest.skip("this launcher has no such process")
    with start() as job:
        run = under_way(tmp_path / "r")
        files = leftovers.files(run.path)
        for pid in [pid for pid in job.left() if Path(f"/proc/{pid}/comm").read_text().strip() in names]:
            os.kill(pid, signal.SIGKILL)
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sum") == SUM
    assert sum(isinstance(event, events.Restarted) for event in events.read(run.events)) == 1
    assert not [path for path in files if path.exists()]


def test_stop_and_resume(start, tmp_path):
    """A signal stops it with a checkpoint; it is resumed on one rank, and no step is done twice."""
    with start() as job:
        run = under_way(tmp_path / "r")
        os.kill(job.process.pid, signal.SIGTERM)
        done = job.wait()
    assert done.code == 130, done.err
    stopped = run.status()
    assert stopped.state == "stopped"
    assert "go on from the checkpoint of step" in done.err
    with Job(hpc_elastic("resume", "r", "--ranks", 1, "--slots", 1), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sum") == SUM
    (event,) = [event for event in events.read(run.events) if isinstance(event, events.Resumed)]
    assert (event.step, event.ranks) == (stopped.step, 1)
    with Job(hpc_elastic("report", "r", "--json"), folder=tmp_path) as job:
        summary = json.loads(job.wait().out)
    assert (summary["attempts"], summary["steps"], summary["steps_lost"]) == (2, TURNS, 0)


def test_supervisor_that_is_killed(start, tmp_path):
    """Its job lives on, but the run is resumed all the same: what is left of it is ended first."""
    with start() as job:
        run = under_way(tmp_path / "r")
        job.process.kill()
        job.process.wait()
        with Job(hpc_elastic("resume", "r"), folder=tmp_path) as second:
            done = second.wait()
        assert done.code == 0, done.err
        assert done.value("sum") == SUM
        resumed(run)
        until(lambda: not job.left())


def test_verify_and_checkpoint(start, tmp_path):
    with start() as job:
        run = under_way(tmp_path / "r")
        before = run.status().step
        with Job(hpc_elastic("checkpoint", "r", "--wait"), folder=tmp_path) as asking:
            assert asking.wait(clean=False).code == 0, asking.text()
        last = [event for event in events.read(run.events) if isinstance(event, events.Checkpointed)][-1]
        assert last.step >= before
        assert job.wait().code == 0
    with Job(hpc_elastic("verify", "r", "--json"), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0
    assert [row["problems"] for row in json.loads(done.out)] == [[], [], []]
