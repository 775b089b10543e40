"""Newcomers from a warm parent: the same bits, a cold start wherever that can't serve, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.rundir import RunDirectory
from jobs.image.prepare import prepare

from ..afterwards import happened
from ..launch import SCRIPTS, Job, hpc_elastic, python, until
from ..rarely import also

EPOCHS, PAUSE_S = 400, 0.02
HOST = os.uname().nodename


def script(shards):
    return [SCRIPTS / "softmax.py", shards, EPOCHS, "--pause", PAUSE_S]


@pytest.fixture
def start(shards, tmp_path):
    """Start a job that has a warm parent, though it imports little."""

    def begin(*arguments, program=(), environ=None):
        command = program or hpc_elastic("run", "--run-dir", "r", "--slots", 4, "--set", "warm=on")
        return Job([*map(str, [*command, *(arguments or script(shards))])], folder=tmp_path, environ=environ)

    return begin


def under_way(path):
    until(lambda: (path / "status.json").exists() and RunDirectory(path).status().step > 0)
    return RunDirectory(path)


def parent(run, starts=1):
    """Return the pid of the warm parent, once it is ready, as the one that was started so many times."""
    log, lock = run.path / "warm" / f"{HOST}.log", run.path / "warm" / f"{HOST}.lock"
    until(lambda: log.exists() and log.read_text().count(" modules in ") == starts, 90)
    until((run.path / "warm" / f"{HOST}.sock").exists)
    return int(lock.read_text())


def resized(run, ranks):
    """Have the job go to so many ranks; return how the newcomers came."""
    before = len(happened(run.path, events.Ready))
    subprocess.run(hpc_elastic("resize", str(run.path), str(ranks), "--wait"), check=True, timeout=60)
    until(lambda: run.status().ranks == ranks)
    return [event.how for event in happened(run.path, events.Ready)[before:]]


def stopped(job, run):
    subprocess.run(hpc_elastic("stop", str(run.path)), check=True, timeout=60)
    done = job.wait()
    assert done.code == 0, done.err
    return done


def test_newcomers_are_forked(start, tmp_path):
    """Also by a leader that was one itself; and when the leader that started the warm parent has gone."""
    with start(environ={"NAME": os.fsdecode(b"\xff")}) as job:  # which is no UTF-8
        run = under_way(tmp_path / "r")
        first = parent(run)
        assert resized(run, 3) == ["warm", "warm"]
        os.kill(run.status().members[0].pid, signal.SIGTERM)
        until(lambda: 0 not in [member.id for member in run.status().members])
        assert resized(run, 4) == ["warm", "warm"]
        assert parent(run) == first
        stopped(job, run)
    assert all(run.end_of(number).code == 0 for number in range(1, 5))
    assert not (run.path / "warm" / f"{HOST}.sock").exists()


def test_same_bits(shards, start, tmp_path):
    few, done = [SCRIPTS / "softmax.py", shards, 100], tmp_path / "done"
    with start(*few, program=hpc_elastic("run", "--run-dir", "s")) as job:
        static = job.wait().value("sha256")
    with start(*few, "--pause", PAUSE_S, "--until", done) as job:
        run = under_way(tmp_path / "r")
        parent(run)
        assert [*resized(run, 3), *resized(run, 1), *resized(run, 4)] == ["warm"] * 5
        done.touch()
        assert job.wait().value("sha256") == static
    ends = [run.end_of(number) for number in range(6)]
    assert [(end.code, end.signal, end.last_words) for end in ends] == [(0, 0, "")] * 6
    assert all(end.peak_bytes > 0 for end in ends)


@pytest.mark.all_faults
def test_parent_that_is_killed(start, tmp_path):
    """Its newcomers go on; the next one starts by itself, and later ones are forked again."""
    with start() as job:
        run = under_way(tmp_path / "r")
        first = parent(run)
        assert resized(run, 2) == ["warm"]
        os.kill(first, signal.SIGKILL)
        assert resized(run, 3) == ["cold: it was not ready"]
        assert parent(run, 2) != first
        assert resized(run, 4) == ["warm"]
        stopped(job, run)
    end = run.end_of(1)
    assert (end.code, end.signal) == (1, 0)
    assert "it is not known how it ended" in end.last_words


@pytest.mark.all_faults
def test_parent_that_stalls(start, tmp_path):
    with start() as job:
        run = under_way(tmp_path / "r")
        pid = parent(run)
        os.kill(pid, signal.SIGSTOP)
        assert resized(run, 2) == ["cold: it did not answer within 1 s"]
        os.kill(pid, signal.SIGCONT)
        assert resized(run, 3) == ["warm"]  # and whom it forked for the first one has ended
        stopped(job, run)


@pytest.mark.parametrize("supervised", [False, also(True)])
def test_end_with_a_parent_that_is_stopped(supervised, start, tmp_path):
    """It holds nothing that the launcher waits for; the supervisor ends it, or those do that wait to be newcomers."""
    with start() as job:
        run = under_way(tmp_path / "r")
        pid = parent(run)
        until(lambda: (run.path / "warm" / f"{HOST}.log").read_text().count("a process waits") == 2)
        if not supervised:
            job.process.kill()
        os.kill(pid, signal.SIGSTOP)
        assert resized(run, 3) == ["cold: it did not answer within 1 s"] * 2
        begun = time.monotonic()
        if supervised:
            stopped(job, run)
        else:
            subprocess.run(hpc_elastic("stop", str(run.path)), check=True, timeout=60)
            until(lambda: not job.left())
        assert time.monotonic() - begun < 40  # a launcher waits for a minute if somebody holds its pipes


@pytest.fixture
def library(shards, tmp_path):
    """Write a module, as if it lay in site-packages, which no test may write to; return the job that imports it."""
    folder = tmp_path / "library"
    folder.mkdir()

    def write(content):
        (folder / "installed.py").write_text(content)
        path = tmp_path / "script.py"
        path.write_text(
            f"import sys; sys.path.append({str(folder)!r})\nimport installed\nfrom pathlib import Path\n"
            f"from hpc_elastic import warmth\nusual = warmth.outside\n"
            f"warmth.outside = lambda: (*usual(), Path({str(folder)!r}))\n" + (SCRIPTS / "softmax.py").read_text()
        )
        return [path, *script(shards)[1:]]

    return write


@pytest.mark.all_faults
def test_code_that_has_changed(library, start, tmp_path):
    """The parent has what was there before: it goes, and another one is started, though the first one's child lives on."""
    with start(*library("VALUE = 1\n")) as job:
        run = under_way(tmp_path / "r")
        first = parent(run)
        assert resized(run, 2) == ["warm"]
        library("VALUE = 22\n")
        assert resized(run, 3) == ["cold: installed changed since it was imported"]
        assert parent(run, 2) != first
        assert resized(run, 4) == ["warm"]
        assert Path(f"/proc/{first}").exists()
        stopped(job, run)
    assert all(run.end_of(number).code == 0 for number in range(4))


@pytest.mark.all_faults
def test_parent_that_can_not_serve(library, start, tmp_path):
    """It is not started again and again, and newcomers say why they came cold."""
    content = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    with start(*library(content)) as job:
        run = under_way(tmp_path / "r")
        until((run.path / "warm" / f"{HOST}.refused").exists)
        assert resized(run, 2) == ["cold: what it imports goes on in 1 threads, which a fork does not take along"]
        stopped(job, run)


@pytest.mark.all_faults
@pytest.mark.parametrize("what", ["raise ValueError", "os.kill(os.getpid(), 9)", "time.sleep(5)"])
def test_rehearsal_that_fails(what, library, start, tmp_path):
    """Newcomers are forked all the same."""
    program = library(f"import os, time\ndef rehearse(number):\n    {what}\n")
    register = "from hpc_elastic import warmth\nwarmth.rehearsals['installed'] = {'number': 1}\n"
    program[0].write_text(register + program[0].read_text())
    with start(*program) as job:
        run = under_way(tmp_path / "r")
        parent(run)
        assert resized(run, 3) == ["warm", "warm"]
        stopped(job, run)
    said = "not rehearsed: installed: ValueError: " in (run.path / "warm" / f"{HOST}.log").read_text()
    assert said == (what == "raise ValueError")


@pytest.mark.all_faults
def test_newcomer_that_dies(start, tmp_path):
    """As it warms up: its guard says how, which only its parent knows."""
    with start(environ={"HPC_ELASTIC_FAULT": "warm:kill:member=1"}) as job:
        run = under_way(tmp_path / "r")
        parent(run)
        subprocess.run(hpc_elastic("resize", str(run.path), "2"), check=True, timeout=60)
        until(lambda: run.end_of(1) is not None)
        assert run.end_of(1).signal == signal.SIGKILL
        assert resized(run, 3) == ["warm", "warm"]
        stopped(job, run)


@pytest.mark.parametrize("alone", [False, also(True)])
def test_nothing_left_when_killed(alone, start, tmp_path):
    """The only rank, without a supervisor; the supervisor and all ranks. The parent sees that nobody is there."""
    environ = {"HPC_ELASTIC_WARM": "on", "HPC_ELASTIC_SLOTS": "2", "HPC_ELASTIC_RUN_DIR": "r"}
    with start(program=python(), environ=environ) if alone else start() as job:
        run = under_way(tmp_path / "r")
        pid = parent(run)
        if not alone:
            os.kill(job.process.pid, signal.SIGKILL)
        for member in run.status().members:
            os.kill(member.pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists())
        job.process.wait()
        until(lambda: not job.left())


@pytest.mark.tensorflow
@pytest.mark.all_faults
def test_tensorflow(tmp_path):
    """The same bits; and a newcomer has little memory of its own."""
    prepare("digits", "upright", tmp_path / "digits-upright")
    job_of = ("-m", "jobs.image.train", "--folder", str(tmp_path), "--epochs", "25")
    with Job(hpc_elastic("run", "--run-dir", "s", *job_of), folder=tmp_path, limit_s=180) as job:
        static = job.wait().value("sha256")
    command = hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--set", "warm=auto", *job_of)
    with Job(command, folder=tmp_path, limit_s=180) as job:
        run = under_way(tmp_path / "r")
        parent(run)
        assert resized(run, 2) == ["warm"]
        newcomer = run.status().members[1].pid
        rollup = Path(f"/proc/{newcomer}/smaps_rollup").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
        assert kib["Private_Clean"] + kib["Private_Dirty"] < 150 * 1024
        assert job.wait().value("sha256") == static
    assert [run.end_of(number).code for number in range(2)] == [0, 0]


@pytest.mark.tensorflow
@pytest.mark.all_faults
def test_rehearsal_leaves_no_trace(tmp_path):
    """A newcomer that has rehearsed finds names, random numbers and settings as one that was started cold."""
    command = hpc_elastic("run", "--run-dir", "r", "--slots", 3, "--set", "warm=on", SCRIPTS / "traces.py")
    with Job(command, folder=tmp_path, limit_s=180) as job:
        run = under_way(tmp_path / "r")
        parent(run)
        log, socket = run.path / "warm" / f"{HOST}.log", run.path / "warm" / f"{HOST}.sock"
        until(lambda: log.read_text().count("a process waits") == 2)
        assert "not rehearsed" not in log.read_text()
        assert not list(tmp_path.glob("tmp-*/*.py"))  # AutoGraph's
        assert not [path for path in (run.path / "warm").iterdir() if path.is_dir()]
        assert resized(run, 2) == ["warm"]
        socket.rename(tmp_path / "away.sock")
        assert resized(run, 3) == ["cold: it was not ready"]
        stopped(job, run)
    seed, warm, cold = ((tmp_path / f"{number}.txt").read_text() for number in range(3))
    assert warm == cold == seed
