"""Jobs that are lost as a whole, stopped or killed: they go on from their last checkpoint, and come to the same result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hpc_elastic import events
from hpc_elastic.checkpoint import Store
from hpc_elastic.comm.vendor import LAUNCHERS_FILES, find_mpiexec
from hpc_elastic.rundir import RunDirectory

from ..afterwards import happened
from ..launch import Job, hpc_elastic, until
from ..rarely import also

TURNS, EVERY = 400, 20
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

    def begin(*options, turns=TURNS):
        settings = ["--run-dir", "r", "--slots", 2, "--ranks", 2, "--hold", "--set", f"checkpoint_steps={EVERY}", *options]
        return Job(hpc_elastic("run", *settings, "script.py", turns), folder=tmp_path)

    return begin


def under_way(path):
    """Return the run when it has two ranks and a checkpoint."""
    until((path / "status.json").exists)
    run = RunDirectory(path)
    until(lambda: run.status().ranks == 2 and any(isinstance(e, events.Checkpointed) for e in events.read(run.events)))
    return run


def signal_all(run, number):
    for member in run.status().members:  # a newcomer's own record comes later
        os.kill(member.pid, number)


def resumed(run):
    (event,) = [event for event in events.read(run.events) if isinstance(event, events.Resumed)]
    assert event.step > 0
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
    entries = events.read(run.events)
    (event,) = [event for event in entries if isinstance(event, events.Restarted)]
    assert event.attempt == 2
    before = entries[: entries.index(event)]
    assert resumed(run).step >= max(entry.step for entry in before if isinstance(entry, events.Checkpointed))
    assert run.status().state == "ended"


@pytest.mark.parametrize("killed", ["proxy", "launcher", also("both")])
def test_launcher_in_pieces(killed, start, tmp_path):
    """A launcher without the process that it works through would stay for ever; one that is killed leaves a file."""
    proxy = find_mpiexec()[1].proxy
    if not proxy:
        pytest.skip("this launcher has no such process")
    with start() as job:
        run = under_way(tmp_path / "r")
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in job.left()}
        proxies = {pid for pid, name in names.items() if name == proxy[:15]}
        launchers = {pid for pid, name in names.items() if name.startswith("mpiexec")}
        opened = {path.readlink() for pid in proxies for path in Path(f"/proc/{pid}/fd").iterdir()}
        files = [path for path in opened if path.parent == LAUNCHERS_FILES]
        for pid in {"proxy": proxies, "launcher": launchers, "both": launchers | proxies}[killed]:
            os.kill(pid, signal.SIGKILL)
        done = job.wait()
    assert proxies
    assert launchers
    assert done.code == 0, done.err
    assert done.value("sum") == SUM
    assert len(happened(run.path, events.Restarted)) == 1
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
    with start(turns=3 * TURNS) as job:
        run = under_way(tmp_path / "r")
        job.process.kill()
        job.process.wait()
        with Job(hpc_elastic("resume", "r"), folder=tmp_path) as second:
            done = second.wait()
        assert done.code == 0, done.err
        assert done.value("sum") == str(sum(range(3 * TURNS)))
        resumed(run)
        until(lambda: not job.left())


SAVING = """
import sys, time
import numpy as np
import hpc_elastic as he

def train(job):
    x, turns = np.zeros(1 << 18), np.zeros(1, np.int64)
    plate = job.array((1 << 10, 64), np.float64, name="plate")
    job.register(x=x, turns=turns)
    for turn in job.loop(1_000_000):
        x += 1
        plate.local[:] += 1
        turns += 1
        time.sleep(0.002)

if __name__ == "__main__":
    he.run(train)
"""


def kill_everything(job):
    """Kill the whole tree, the supervisor first: nobody is left who could tidy up."""
    for pid in [job.process.pid, *job.left()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.process.wait()
    until(lambda: not job.left())


def test_everything_killed_while_checkpoints_are_written(request, tmp_path):
    """At any moment: a good checkpoint is found, and it is no older than the last that was told of."""
    kills, draw = 50 if request.config.getoption("all_faults") else 6, random.Random(7)
    (tmp_path / "saving.py").write_text(SAVING)
    settings = ["--ranks", 2, "--slots", 2, "--set", "checkpoint_steps=6"]
    command = hpc_elastic("run", "--run-dir", "r", *settings, "saving.py")
    reached = 0
    for _ in range(kills):
        with Job(command, folder=tmp_path) as job:
            until((tmp_path / "r" / "status.json").exists)
            run = RunDirectory(tmp_path / "r")
            seen = len(happened(run.path, events.Checkpointed))
            until(lambda run=run, seen=seen: len(happened(run.path, events.Checkpointed)) >= seen + 2)
            moment = time.monotonic() + draw.uniform(0, 0.5)
            until(lambda moment=moment: time.monotonic() > moment)
            told = [event.step for event in happened(run.path, events.Checkpointed) if not event.error]
            kill_everything(job)
        newest = Store(run.path / "checkpoints").newest()
        assert newest is not None
        step = newest.about.cursor.step
        assert step >= max(told) > reached
        np.testing.assert_array_equal(newest.rows("plate", 0, 1 << 10), step)
        reached = step
        command = hpc_elastic("resume", "r")
    assert not list((run.path / "checkpoints").glob("*.damaged"))


def test_verify_and_checkpoint(start, tmp_path):
    with start(turns=3 * TURNS) as job:
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


def test_a_rank_whose_guard_is_gone_before_it_has_joined(tmp_path):
    """Nobody would say how it ends: it does so itself, as later on, and the job starts again."""
    kill = "if not os.path.exists('r/attempts'):\n    os.kill(os.getppid(), 9)\n    time.sleep(0.5)\n"
    (tmp_path / "script.py").write_text("import os\nimport time\n" + kill + SCRIPT)
    with Job(hpc_elastic("run", "--run-dir", "r", "script.py", TURNS), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sum") == SUM
    assert len(happened(tmp_path / "r", events.Restarted)) == 1
