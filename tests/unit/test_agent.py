"""The agent of a companion, run as it is, but outside Slurm: what it starts, when it ends, and what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpc_elastic
from hpc_elastic import agent as agents
from hpc_elastic.keeper import Keeper
from hpc_elastic.places import companion_file, order_file
from hpc_elastic.rundir import RunDirectory

AGENT = Path(hpc_elastic.__file__).parent / "agent.py"
LIMIT_S = 20.0


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


@pytest.fixture
def agent(run):
    started = []

    def start(quiet_s=LIMIT_S):
        environ = {key: value for key, value in os.environ.items() if key != "SLURMD_NODENAME"}
        command = [sys.executable, "-I", "-S", AGENT, run.path, "0", str(quiet_s)]
        started.append(subprocess.Popen(command, env=environ | {"SLURM_JOB_ID": "17"}, stdout=subprocess.PIPE, text=True))
        until(companion_file(run.path, 0, "held.json").exists)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def until(done):
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def order(run, member, *command, **environ):
    path = order_file(run.path, 0, member)
    run.put(path, {"command": list(map(str, command)), "environ": environ})


def said(run):
    return companion_file(run.path, 0, "end").read_text()


def test_says_where_it_is_and_gives_signs_of_life(run, agent):
    agent()
    held = json.loads(companion_file(run.path, 0, "held.json").read_text())
    assert held["host"] == os.uname().nodename
    assert held["allocation"] == "17"
    beat = companion_file(run.path, 0, "beat")
    until(beat.exists)
    before = beat.stat().st_mtime_ns
    until(lambda: beat.stat().st_mtime_ns > before)


def test_runs_what_it_is_told(run, agent, tmp_path):
    agent()
    order(run, 3, "/bin/sh", "-c", 'echo "$WHO" > "$WHERE"', WHO="three", WHERE=str(tmp_path / "out"))
    until(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text() == "three\n")
    assert not order_file(run.path, 0, 3).exists()


def test_orders_that_are_no_good_cost_only_themselves(run, agent, tmp_path):
    started = agent()
    order(run, 4, "/no/such/program")
    order_file(run.path, 0, 5).write_text("{")
    order(run, 6, "/bin/touch", tmp_path / "six")
    until((tmp_path / "six").exists)
    companion_file(run.path, 0, "release").touch()
    out, _ = started.communicate(timeout=LIMIT_S)
    assert "newcomer 4 could not be started" in out
    assert "newcomer 5 could not be started" in out
    assert started.returncode == 0
    ends = [run.end_of(member) for member in (4, 5)]
    assert [(end.member, end.host, end.code) for end in ends] == [
        (4, os.uname().nodename, 127),
        (5, os.uname().nodename, 127),
    ]
    assert ends[0].last_words.startswith("its guard could not be started: [Errno 2] No such file")


def test_given_back_when_the_last_one_has_ended(run, agent, tmp_path):
    started = agent()
    order(run, 1, "/bin/sh", "-c", f"until [ -e {tmp_path}/go ]; do sleep 0.01; done; touch {tmp_path}/gone")
    until(lambda: not order_file(run.path, 0, 1).exists())
    companion_file(run.path, 0, "release").touch()
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(0.6)
    (tmp_path / "go").touch()
    assert started.wait(LIMIT_S) == 0
    assert (tmp_path / "gone").exists()
    assert said(run) == "it was given back"


@pytest.mark.parametrize("state", ["ended", "stopped"])
def test_the_job_has_ended(state, run, agent):
    started = agent()
    run.put(run.path / "status.json", {"state": state})
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "the job has ended"


def test_the_program_has_failed(run, agent):
    started = agent()
    run.put(run.path / "failure.json", {"kind": "error"})
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "the job has failed"


def test_a_job_that_is_lost_may_be_restarted(run, agent):
    started = agent(quiet_s=1.0)
    run.put(run.path / "failure.json", {"kind": "lost"})
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "no rank has given a sign of life for 1 s"


def test_nobody_gives_a_sign_of_life(run, agent):
    """What it has started is ended, too."""
    started = agent(quiet_s=1.0)
    order(run, 1, "/bin/sleep", "60")
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "no rank has given a sign of life for 1 s"


def test_signs_of_life_keep_it(run, monkeypatch):
    """Time is set by hand, as who gives them here might be late."""
    clock = [1000.0]
    monkeypatch.setattr(agents.time, "monotonic", lambda: clock[0])
    agent = agents.Agent(str(run.path), "0", 1.0)
    for sign in range(40):
        run.beat_file(0).touch()
        os.utime(run.beat_file(0), (sign, sign))
        assert not agent.quiet()
        clock[0] += 0.9
    assert not agent.quiet()
    clock[0] += 0.2
    assert agent.quiet()


def test_the_run_directory_is_gone(run, agent):
    started = agent()
    run.path.rename(run.path.with_name("elsewhere"))
    assert started.wait(LIMIT_S) == 0


def test_told_to_end(run, agent):
    started = agent()
    started.send_signal(signal.SIGTERM)
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "it was told to end"


def test_told_to_end_while_it_starts_somebody(run, agent, tmp_path):
    """Nobody is left behind: each of these ends the agent, most likely while that starts the next one."""
    begun = tmp_path / "begun"
    begun.mkdir()
    order_file(run.path, 0, 1).parent.mkdir(parents=True)
    for member in range(1, 21):
        order(run, member, "/bin/sh", "-c", f"touch {begun}/$$; kill $PPID; exec sleep 1000", PATH=os.environ["PATH"])
    started = agent()
    assert started.wait(LIMIT_S) == 0
    assert said(run) == "it was told to end"
    until(lambda: not [each for each in begun.iterdir() if Path(f"/proc/{each.name}").exists()])


def test_the_sentinel_notes_the_signal(run):
    started = subprocess.Popen([sys.executable, "-I", "-S", AGENT, "--sentinel", run.path, "0"])
    try:
        term = companion_file(run.path, 0, "term")

        def told():
            started.send_signal(signal.SIGTERM)
            return term.exists() or started.poll() is not None

        caught = Path(f"/proc/{started.pid}/status")
        until(lambda: int(caught.read_text().split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1))
        until(told)
        assert term.exists()
    finally:
        started.kill()
        started.wait()


def test_the_agent_of_the_jobs_own_host(run):
    """It forgets what the one of an attempt before has left, starts what it is told, and ends nothing but itself."""
    companion_file(run.path, -1, "end").write_text("it was told to end")
    note = run.path / "note"
    command = [sys.executable, "-I", "-S", AGENT, run.path, "own", str(LIMIT_S)]
    with subprocess.Popen(command, env=os.environ | {"SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "17", "PATH": ""}) as started:
        until(companion_file(run.path, -1, "held.json").exists)
        assert not companion_file(run.path, -1, "end").exists()
        run.put(order_file(run.path, -1, 3), {"command": ["/bin/sh", "-c", f"echo $X > {note}"], "environ": {"X": "y"}})
        until(lambda: note.exists() and note.read_text() == "y\n")
        started.terminate()
    assert companion_file(run.path, -1, "end").read_text() == "it was told to end"


def test_keeps_a_warm_parent_where_the_job_has_some(run, agent, tmp_path):
    process = agent()
    note = tmp_path / "pid"
    spec = {"command": ["/bin/sh", "-c", f"echo $$ $KIND > {note}.new; mv {note}.new {note}; exec sleep 1000"]}
    run.put(run.path / "warm" / "spec.json", {**spec, "environ": {"KIND": "warm", "PATH": os.environ["PATH"]}})
    until(note.exists)
    pid, kind = note.read_text().split()
    assert kind == "warm"
    process.terminate()
    process.wait(LIMIT_S)
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_the_warm_parent_is_ended_last(run, agent, tmp_path):
    """The guards ask it how their ranks have ended."""
    process = agent()
    begun, gone, note = tmp_path / "begun", tmp_path / "gone", tmp_path / "note"
    wait = "while :; do sleep 0.01; done"
    told = f'trap "[ -e {gone} ] && echo after > {note} || echo before > {note}; exit" TERM'
    lock = f"exec 9>{Keeper(str(run.path)).file('lock')}; flock -x 9"  # without it, others would be started
    spec = {"command": ["/bin/sh", "-c", f"{lock}; {told}; touch {begun}; {wait}"], "environ": {"PATH": os.environ["PATH"]}}
    run.put(run.path / "warm" / "spec.json", spec)
    ready = tmp_path / "ready"
    ending = f'trap "sleep 0.3; touch {gone}; exit" TERM; touch {ready}; {wait}'
    order(run, 1, "/bin/sh", "-c", ending, PATH=os.environ["PATH"])
    until(lambda: ready.exists() and begun.exists())
    process.terminate()
    process.wait(LIMIT_S)
    until(lambda: note.exists() and note.read_text())
    assert note.read_text() == "after\n"
