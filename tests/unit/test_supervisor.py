"""The supervisor: it starts again what was lost, cleans up in between, gives up in time, stops when asked, and resumes.

The ranks are real processes under a real launcher, but say what they say through `standin`, in the runtime's place.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_elastic import attempt, events, leftovers, restarts, supervisor
from hpc_elastic.attempt import Pulse
from hpc_elastic.checkpoint import About, Store
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.config import RUN_VARIABLE
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.interrupts import Interrupts
from hpc_elastic.model import Cursor, Request
from hpc_elastic.restarts import Setback, account, wait_s, why_not
from hpc_elastic.rundir import RunDirectory
from hpc_elastic.summary import summarize
from tests.launch import Job, until
from tests.launch import hpc_elastic as command

LIMIT_S = 40.0
HEAD = """
import os, pathlib, subprocess, sys, time
from hpc_elastic.model import Request
from tests.unit.standin import Rank
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("HPC_ELASTIC_"):
            monkeypatch.delenv(name)


@pytest.fixture
def start(tmp_path):
    """Start a script under the supervisor."""

    def begin(text, **settings):
        (tmp_path / "script.py").write_text(HEAD + text)
        given = [f"--set={name}={value}" for name, value in {"progress": "off", **settings}.items()]
        return Job(command("run", "--run-dir", "r", *given, "script.py"), folder=tmp_path, limit_s=LIMIT_S)

    return begin


def resumed(tmp_path, *options):
    return Job(command("resume", *options, "r"), folder=tmp_path, limit_s=LIMIT_S)


def run():
    return RunDirectory(Path("r"))


def told(kind):
    return [event for event in events.read(run().events) if isinstance(event, kind)]


def lines(done):
    """Return what the supervisor itself said."""
    return [line.removeprefix("hpc_elastic: ") for line in done.err.splitlines() if line.startswith("hpc_elastic: ")]


# --- restarts ---------------------------------------------------------------------------------------------------------

LOST_ONCE = """
rank = Rank()
if rank.attempt == 1:
    rank.step(7)
    (rank.run.path / "newcomers" / "3.json").touch()
    (rank.run.path / "office.json").write_text("{}")
    rank.run.ask(Request("resize", 3))
    rank.fail("lost", step=9, error="process 4 was killed")
rank.step(10)
rank.end()
"""


def test_a_job_that_was_lost_is_started_again(start):
    with start(LOST_ONCE) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert lines(done) == [
        "process 4 was killed",
        "restart 1 of 5, from the beginning, since there is no checkpoint",
    ]
    (event,) = told(events.Restarted)
    assert (event.attempt, event.step, event.reason, event.wait_s) == (2, 9, "process 4 was killed", 0.0)
    first, second = told(events.Started)
    assert first.time < event.time < second.time


def test_the_next_attempt_begins_clean(start):
    with start(LOST_ONCE) as job:
        job.wait()
    old, now = Path("r/attempts/1"), Path("r")
    assert {path.name for path in old.iterdir()} == {
        *("ranks", "newcomers", "condemned", "losses"),
        *("office.json", "failure.json"),
    }
    assert (old / "newcomers" / "3.json").exists()
    assert (old / "ranks" / "0.json").exists()
    assert json.loads((old / "failure.json").read_bytes())["kind"] == "lost"
    assert not list((now / "newcomers").iterdir())
    assert not (now / "office.json").exists()
    assert not run().failed()
    assert [request.ranks for _, request in run().requests()] == [3], "requests are people's, and stay"
    folders = [path for path in now.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (now, *folders)} == {0o700}


def test_the_first_restart_comes_at_once(start):
    with start(
        """
rank = Rank()
if rank.attempt == 1:
    pathlib.Path("died").write_text(str(time.time()))
    rank.fail("lost")
rank.end()
"""
    ) as job:
        job.wait()
    (event,) = told(events.Restarted)
    assert event.wait_s == 0.0
    # 0.1 s, but for a machine that stalls: less than is given to ranks that may have something to say.
    assert event.time - float(Path("died").read_text()) < attempt.GRACE_S


def test_an_error_of_the_program_is_not_restarted(start):
    with start('Rank().fail("error", step=4, error="rank 0 failed")') as job:
        done = job.wait()
    assert done.code == 1
    assert lines(done) == [f"run directory {Path('r').absolute()}"]
    assert told(events.Restarted) == []
    assert run().failure().error == "rank 0 failed"


def test_a_failure_before_he_run_is_not_restarted(start):
    with start("raise OSError('no licence')") as job:
        done = job.wait()
    assert done.code == 1
    assert "no licence" in done.err
    assert lines(done)[-1].endswith(f"run directory {Path('r').absolute()}")
    assert told(events.Restarted) == []
    found = summarize(run())
    assert found["state"] == "failed"
    assert found["failure"]["error"].startswith("the job ended early")


@pytest.mark.parametrize("how", ["rank.leave(0)", "rank.leave(3)", "os.kill(os.getpid(), 9)"])
def test_a_launcher_that_ends_too_early(how, start):
    """No failure says why; the job has not ended, and that is enough."""
    with start(f"rank = Rank()\nif rank.attempt == 1:\n    rank.step(5)\n    {how}\nrank.end()") as job:
        done = job.wait()
    assert done.code == 0, done.err
    (event,) = told(events.Restarted)
    assert event.step == 5


def test_an_attempt_that_does_no_step_has_none(start):
    """The status is that of the attempt before, then."""
    text = 'rank = Rank()\nif rank.attempt == 1:\n    rank.step(5)\nrank.fail("lost") if rank.attempt < 3 else rank.end()'
    with start(text) as job:
        assert job.wait().code == 0
    assert [event.step for event in told(events.Restarted)] == [5, -1]


def test_a_launcher_that_is_killed(start):
    """Ranks that outlive it and go on are let be; these don't."""
    with start(
        """
import psutil
rank = Rank()
if rank.attempt == 1:
    rank.step(5)
    for process in psutil.Process().parents():
        if process.name() in ("mpiexec", "mpiexec.hydra", "prterun", "mpirun"):
            process.kill()
    time.sleep(60)
rank.end()
""",
        stall_s=0.5,
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    (event,) = told(events.Restarted)
    assert event.step == 5


def test_a_launcher_without_its_proxy_is_ended(start):
    """It would hear nothing any more, pass on nothing, and might never end."""
    with start(
        """
import psutil
rank = Rank()
if rank.attempt == 1:
    rank.step(5)
    proxies = [process for process in psutil.Process().parents() if process.name() == "hydra_pmi_proxy"]
    time.sleep(1)  # the supervisor looks for it now and then
    if not proxies:
        rank.leave(0)  # this MPI's launcher has none
    for process in proxies:
        process.kill()
    while True:
        rank.beat()
        time.sleep(0.1)
rank.end()
""",
        stall_s=1,
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    (event,) = told(events.Restarted)
    assert event.step == 5


def test_ranks_that_go_on_without_the_launcher_are_waited_for(start):
    """Newcomers can have a launcher of their own, and the seed leave before them."""
    with start(
        """
rank = Rank()
if os.fork() == 0:
    import tests.unit.standin as standin, msgspec
    os.setsid()
    standin.ME = msgspec.structs.replace(standin.ME, id=1, pid=os.getpid())
    os.closerange(0, 100)  # the launcher waits for whoever holds an end of its pipes
    rank.record("member")
    for _ in range(100):
        rank.beat()
        time.sleep(0.01)
    rank.end()
    os._exit(0)
while rank.run.record(1) is None:
    time.sleep(0.01)
rank.record("retired")
rank.leave(0)
""",
        stall_s=0.5,
        arrival="join",
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert told(events.Restarted) == []


# --- what hangs -------------------------------------------------------------------------------------------------------


def test_a_job_without_a_sign_of_life_is_started_again(start):
    with start(
        """
rank = Rank()
if rank.attempt == 1:
    rank.step(5)
    rank.freeze()
rank.end()
""",
        stall_s=0.5,
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    (event,) = told(events.Restarted)
    assert (event.step, event.reason) == (5, "no sign of life from any rank for 1 s")


def test_a_job_that_never_shows_life_is_started_again(start):
    with start("time.sleep(60)", deadline_s=1, restarts=1) as job:
        done = job.wait()
    assert done.code == 1
    (event,) = told(events.Restarted)
    assert (event.step, event.reason) == (-1, "no sign of life from any rank for 1 s")
    assert lines(done).count(event.reason) == 1
    assert "given up: restarts = 1, and all are used up" in lines(done)


def test_the_scripts_own_settings_count(start):
    """The job says what came of all settings; here the script gave a stall_s of its own."""
    with start("rank = Rank(stall_s=0.5, restarts=0)\nrank.step(5)\ntime.sleep(60)") as job:
        done = job.wait()
    assert done.code == 1
    assert lines(done)[0] == "given up: restarts = 0, so it is not started again"


def test_what_follows_the_job_may_take_its_time(start):
    """A script can go on for hours after he.run, when nobody shows a sign of life any more."""
    with start("Rank().end()\ntime.sleep(2)", stall_s=0.3) as job:
        done = job.wait()
    assert done.code == 0
    assert done.seconds > 2


def test_what_is_stopped_when_the_job_has_ended_well_is_ended(start):
    """As a warm parent can be, and what it has forked: it would never see that the run is over."""
    with start(
        """
import signal
Rank().end()
null = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdin=null, stdout=null, stderr=null)
os.kill(child.pid, signal.SIGSTOP)
"""
    ) as job:
        assert job.wait().code == 0


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def silences(pulse, clock, until_s):
    """Look twice a second, and return after how long silence was told."""
    begun = clock.now
    while clock.now < begun + until_s:
        clock.now += 0.5
        if pulse.silence(stall_s=3.0, deadline_s=20.0):
            return clock.now - begun
    return None


def test_pulse_waits_for_the_first_sign(tmp_path):
    clock = Clock()
    assert silences(Pulse(tmp_path, clock), clock, 30) == 20.5


def test_pulse_judges_by_changes_alone(tmp_path):
    """The clock of whoever touches the file may be wrong."""
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    beat = tmp_path / "4.beat"
    beat.touch()
    for number in range(20):
        os.utime(beat, (10.0, 1_000_000 - number))
        assert silences(pulse, clock, 5) is None
    (tmp_path / "5.beat").touch()
    assert silences(pulse, clock, 30) == 7.0, "0.5 s until the last change is seen, then more than 6 s"


def test_pulse_of_ranks_that_leave(tmp_path):
    """A file that goes away is no sign of life."""
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    (tmp_path / "4.beat").touch()
    assert silences(pulse, clock, 5) is None
    (tmp_path / "4.beat").unlink()
    assert silences(pulse, clock, 5) is not None


def test_pulse_of_a_supervisor_that_was_stopped(tmp_path):
    """Everybody was, perhaps: the others first get their time."""
    clock = Clock()
    pulse = Pulse(tmp_path, clock)
    (tmp_path / "4.beat").touch()
    assert silences(pulse, clock, 5) is None
    clock.now += 1000
    assert silences(pulse, clock, 5) is None


def test_pulse_of_a_folder_that_is_gone(tmp_path):
    assert attempt.beats(tmp_path / "none") == {}


# --- giving up --------------------------------------------------------------------------------------------------------


def test_a_step_that_fails_again_and_again(start):
    with start(
        'rank = Rank()\nrank.step(4)\nprint("one\\nMemoryError: too much", file=sys.stderr)\nrank.fail("lost", step=5)'
    ) as job:
        done = job.wait()
    assert done.code == 1
    assert [event.wait_s for event in told(events.Restarted)] == [0.0, 1.0]
    place = Path("r").absolute()
    said = lines(done)
    assert said[said.index("given up: step 5 has failed 3 times") :] == [
        "given up: step 5 has failed 3 times",
        "  attempt 1, step 5: it broke",
        "  attempt 2, step 5: it broke",
        "  attempt 3, step 5: it broke",
        said[-5],
        "    one",
        "    MemoryError: too much",
        f"run directory {place}",
        f"go on from the beginning, since there is no checkpoint, with: hpc-elastic resume {place}",
    ]
    assert said[-5].startswith("  process 0 (pid ")
    assert said[-5].endswith("ended with exit code 1; last words:")
    assert [path.name for path in run().attempts()] == ["1", "2"], "the last one stays, for people to look at"
    assert run().failure().kind == "lost"


def test_restarts_are_used_up(start):
    with start('rank = Rank()\nrank.step(rank.attempt)\nrank.fail("lost", step=rank.attempt)', restarts=1) as job:
        done = job.wait()
    assert done.code == 1
    assert "given up: restarts = 1, and all are used up" in lines(done)
    assert len(told(events.Restarted)) == 1


def test_why_not():
    steps = [Setback(number, number, "lost") for number in range(1, 7)]
    assert why_not(steps[:5], 5) == ""
    assert why_not(steps, 5) == "restarts = 5, and all are used up"
    assert why_not(steps[:1], 0) == "restarts = 0, so it is not started again"
    same = [Setback(1, 7, "a"), Setback(2, 9, "b"), Setback(3, 7, "c"), Setback(4, 7, "d")]
    assert why_not(same[:3], 5) == ""
    assert why_not(same, 5) == "step 7 has failed 3 times"
    assert why_not([Setback(n, -1, "x") for n in range(3)], 5) == "3 times it failed before its first step"


def test_waits():
    assert [wait_s(number) for number in range(1, 11)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert wait_s(2000) == 60


def test_account():
    found = account([Setback(1, -1, "a"), Setback(2, 4, "b", ("process 3:\n  c",))])
    assert found == ["  attempt 1, before its first step: a", "  attempt 2, step 4: b", "  process 3:", "    c"]
    assert restarts.SAME_STEP == 3


# --- cleaning ---------------------------------------------------------------------------------------------------------


def test_an_agent_that_is_stopped_is_killed_in_the_end(monkeypatch):
    monkeypatch.setattr(supervisor, "AGENT_S", 0.1)
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: None); print(flush=True)\nwhile True: signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as agent:
        agent.stdout.readline()
        agent.send_signal(signal.SIGSTOP)
        under = supervisor.Supervisor.__new__(supervisor.Supervisor)
        under._agent = agent
        under._end_agent()
    assert agent.returncode == -signal.SIGKILL


def test_what_is_left_is_ended_before_the_next_attempt(start):
    """Even what has left the launcher's process group, and does not heed SIGTERM."""
    with start(
        """
rank = Rank()
if rank.attempt == 1:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    pathlib.Path("child").write_text(str(child.pid))
    rank.fail("lost")
import psutil
child = int(pathlib.Path("child").read_text())
assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
rank.end()
"""
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert len(told(events.Restarted)) == 1


def test_a_process_that_begins_one_program_after_the_other_always_belongs(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    text = (
        "n, code = sys.argv[1:]; int(n) and os.execv(sys.executable, [sys.executable, '-ISc', code, str(int(n) - 1), code])"
    )
    code = f"import os, sys; {text}; sys.stdin.read()"
    command, environ = [sys.executable, "-ISc", code, "100", code], {RUN_VARIABLE: str(run.path)}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE) as process:
        proc = Path(f"/proc/{process.pid}")
        while proc.joinpath("cmdline").read_bytes().split(b"\0")[3:4] != [b"0"]:
            assert leftovers.belongs(process.pid, run.path)


def test_who_has_an_empty_environment_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "BEGUN_WITHIN_S", LIMIT_S)
    command, pipe = [sys.executable, "-ISc", "print(flush=True); input()"], subprocess.PIPE
    with subprocess.Popen(command, env={}, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        began = time.monotonic()
        assert not leftovers.belongs(process.pid, tmp_path)
        assert time.monotonic() - began < LIMIT_S
        process.stdin.close()
    assert not leftovers.belongs(process.pid, tmp_path)


def sleeper(run, **more):
    environ = {**os.environ, RUN_VARIABLE: str(run), **more}
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_only_the_runs_own_processes_are_ended(tmp_path):
    """Whatever the run directory is called by; this process has the variable as well, and is spared."""
    mine, other = RunDirectory.create(tmp_path / "mine"), RunDirectory.create(tmp_path / "mine2")
    (tmp_path / "link").symlink_to(mine.path)
    os.environ[RUN_VARIABLE] = str(mine.path)
    children = [sleeper(mine.path), sleeper(tmp_path / "link"), sleeper(other.path), sleeper(tmp_path / "gone")]
    try:
        assert set(leftovers.processes(mine.path)) == {children[0].pid, children[1].pid}
        assert leftovers.remove(mine.path, time.time()) == []
        assert [child.wait(LIMIT_S) for child in children[:2]] == [-9, -9]
        assert [child.poll() for child in children[2:]] == [None, None]
        assert not leftovers.belongs(children[0].pid, mine.path)
    finally:
        del os.environ[RUN_VARIABLE]
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()


def test_a_zombie_is_not_left_over(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    child = sleeper(run.path)
    child.kill()
    until(lambda: "Z" in Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1])
    assert leftovers.processes(run.path) == []
    assert leftovers.gone(run.path, 0.0)
    child.wait()
    child.stdout.close()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """Have the end of the terminal heard, also below nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_stops_the_job(number, start):
    with start("rank = Rank()\nrank.step(3)\nrank.until_asked()") as job:
        until(Path("r/status.json").exists)
        os.kill(job.process.pid, number)
        done = job.wait()
    assert done.code == 130
    place = Path("r").absolute()
    assert lines(done) == [
        "stopping at the next step, with a checkpoint; Ctrl-C again ends it now",
        "stopped at step 57",
        f"run directory {place}",
        f"go on from the beginning, since there is no checkpoint, with: hpc-elastic resume {place}",
    ]
    assert run().status().state == "stopped"
    assert not run().failed()


def test_a_second_signal_ends_the_job(start):
    with start("rank = Rank()\nrank.step(3)\nrank.until_asked(heed=False)") as job:
        until(Path("r/status.json").exists)
        os.kill(job.process.pid, signal.SIGUSR2)
        until(run().requests)
        os.kill(job.process.pid, signal.SIGUSR2)  # schedulers repeat themselves; this is no end
        os.kill(job.process.pid, signal.SIGINT)
        done = job.wait()
    assert done.code == 130
    failure = run().failure()
    assert failure.kind == "interrupted"
    assert failure.error.endswith("received SIGINT")
    assert failure.error in lines(done)
    assert told(events.Restarted) == []


def told_to_stop(start, then):
    """Interrupt a job whose rank does something else when it is asked to stop, and return how it ended."""
    with start(f"rank = Rank()\nrank.step(3)\nwhile not rank.run.requests(): time.sleep(0.01)\n{then}") as job:
        until(Path("r/status.json").exists)
        os.kill(job.process.pid, signal.SIGINT)
        return job.wait()


def test_a_job_that_ends_well_all_the_same(start):
    done = told_to_stop(start, "rank.end()")
    assert done.code == 0


def test_a_job_that_is_lost_while_it_stops(start):
    done = told_to_stop(start, "rank.fail('lost', step=3)")
    assert done.code == 130
    assert told(events.Restarted) == []
    assert "it broke" in lines(done)


def test_a_signal_while_it_waits_to_start_again(start):
    with start('rank = Rank()\nrank.fail("lost", step=rank.attempt)') as job:
        until(lambda: Path("r/attempts/4").exists())  # a wait of 4 s
        os.kill(job.process.pid, signal.SIGTERM)
        done = job.wait()
    assert done.code == 130
    assert run().failure().kind == "interrupted"
    assert any("hpc-elastic resume" in line for line in lines(done))


def test_a_stop_that_was_asked_for_otherwise(start):
    with start("rank = Rank()\nrank.step(3)\nrank.until_asked()") as job:
        until(Path("r/status.json").exists)
        run().ask(Request("stop"))
        done = job.wait()
    assert done.code == 0
    assert lines(done)[0].startswith("stopped at step 57; go on from the beginning")


@pytest.mark.parametrize("streams", ["2>&1", "2>/dev/null", "3>&1 1>/dev/null 2>&3"], ids=["both", "stdout", "stderr"])
def test_whoever_reads_has_gone(streams, tmp_path):
    """Such as ``head``, or ``tee``, which Ctrl-C ends too: the job goes on, and stops with a checkpoint when it is told."""
    (tmp_path / "script.py").write_text(
        f"{HEAD}rank = Rank()\nrank.step(3)\nprint('one', flush=True)\nprint('one', file=sys.stderr, flush=True)\n"
        "while not os.path.exists('gone'): time.sleep(0.01)\n"
        "for stream in (sys.stdout, sys.stderr) * 3: print('two', file=stream, flush=True); time.sleep(0.05)\n"
        "pathlib.Path('said').touch()\nrank.until_asked()\n"
    )
    run_it = command("run", "--run-dir", "r", "--progress", "plain", "script.py")
    shell = f'{{ "$@" {streams}; echo $? >code; }} | {{ head -n 1; touch gone; }}'
    with Job(["sh", "-c", shell, "sh", *run_it], folder=tmp_path, limit_s=LIMIT_S) as job:
        until(Path("said").exists)
        run().ask(Request("stop"))
        job.wait()
    assert Path("code").read_text() == "0\n"
    assert run().status().state == "stopped"
    assert told(events.Restarted) == []


def test_a_launcher_that_ends_while_the_job_stops(start):
    """The run is not taken for one that goes on."""
    done = told_to_stop(start, "rank.leave(7)")
    assert done.code == 130
    assert "the job ended before it could stop" in lines(done)
    assert run().failure().kind == "interrupted"


@pytest.mark.parametrize("background", ["&", ""], ids=["background", "foreground"])
def test_what_is_typed_at_a_terminal(background, tmp_path):
    """It is the shell's, if the job runs in the background."""
    if not background and find_mpiexec()[1].title == "Open MPI":
        pytest.skip("Open MPI's launcher reads no terminal of another session")
    (tmp_path / "script.py").write_text(
        f"{HEAD}rank = Rank()\nrank.step(3)\npathlib.Path('began').touch()\n"
        "if not os.path.exists('background'): pathlib.Path('read').write_text(sys.stdin.readline())\n"
        "rank.until_asked()\n"
    )
    if background:
        (tmp_path / "background").touch()
    job, shell = pty.fork()
    if job == 0:
        os.execvp("bash", ["bash", "--norc", "-i"])
    words = [*command("run", "--run-dir", "r", "--progress", "off", "script.py"), ">out", "2>&1", background]
    os.write(shell, f"export PYTHONPATH={Path(__file__).parents[2]}; {' '.join(words)}\n".encode())
    try:
        until(Path("began").exists)
        for number in range(5 if background else 1):
            os.write(shell, f"echo >typed-{number}\n".encode())
            until(Path(f"typed-{number}" if background else "read").exists)
        run().ask(Request("stop"))
        until(lambda: run().status().state == "stopped" and not run().is_supervised())
    finally:
        os.close(shell)
        os.waitpid(job, 0)
    assert background or Path("read").read_text() == "echo >typed-0\n"


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.wait(0.0)
        assert interrupts.first == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
def test_interrupts_cut_a_wait_short():
    begun = time.monotonic()
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        interrupts.wait(LIMIT_S)
        assert (interrupts.first, interrupts.again) == ("SIGHUP", "")
        os.kill(os.getpid(), signal.SIGUSR2)
        interrupts.wait(LIMIT_S)
        assert interrupts.again == ""
        os.kill(os.getpid(), signal.SIGTERM)
        interrupts.wait(LIMIT_S)
        assert interrupts.again == "SIGTERM"
        child = subprocess.Popen(["true"])
        interrupts.wait(LIMIT_S)
        child.wait()
    assert time.monotonic() - begun < LIMIT_S / 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- resume -----------------------------------------------------------------------------------------------------------

WHOLE = """
rank = Rank()
rank.step(3)
if pathlib.Path("go").exists():
    config = (rank.run.path / "config.json").read_text()
    print("resumed", rank.attempt, *sys.argv[1:], os.getcwd(), config, len(rank.run.requests()), rank.run.status().step)
    rank.end()
else:
    {otherwise}
"""


def test_resume_a_run_that_was_stopped(start, tmp_path, monkeypatch):
    with start(WHOLE.format(otherwise="rank.until_asked()"), deadline_s=50) as job:
        until(Path("r/status.json").exists)
        os.kill(job.process.pid, signal.SIGINT)
        assert job.wait().code == 130
    run().ask(Request("stop"))  # nobody reads it any more, and it must not stop the next attempt
    Path("go").touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = ["--ranks", 2, "--max", 3, "--set", "stall_s=7"]
    with Job(command("resume", *options, tmp_path / "r"), folder=tmp_path / "elsewhere", limit_s=LIMIT_S) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert f"run directory {tmp_path / 'r'}, from the beginning, since there is no checkpoint" in done.err
    number, *_ = done.value("resumed").split()
    assert number == "2"
    assert str(tmp_path) in done.out
    settings = json.loads((tmp_path / "r" / "config.json").read_bytes())
    assert settings == {
        "deadline_s": 50.0,
        "progress": "off",
        "run_dir": "r",
        "ranks": 2,
        "max": 3,
        "stall_s": 7.0,
        "warm": "off",  # as all jobs of tests have it
    }
    assert RunDirectory(tmp_path / "r").launch().settings == settings
    assert done.value("resumed").split()[-2] == "0", "the old request has been answered"


REFUSES = """
rank = Rank()
if "microbatches" in (rank.run.path / "config.json").read_text():
    rank.step(0, "failed")
    rank.fail("error", error="other bits would come")
rank.step(3)
rank.until_asked() if rank.attempt == 1 else rank.end()
"""


def test_settings_that_the_job_refuses_are_not_kept(start, tmp_path):
    with start(REFUSES) as job:
        until(Path("r/status.json").exists)
        run().ask(Request("stop"))
        assert job.wait().code == 0
    before = run().launch()
    with resumed(tmp_path, "--set", "microbatches=7") as job:
        assert job.wait().code == 1
    assert run().launch() == before
    with resumed(tmp_path) as job:
        assert job.wait().code == 0


@pytest.mark.parametrize(
    ("how", "code"), [('rank.fail("error")', 1), ('rank.fail("lost")', 1), ("rank.leave(3)", 1), ("raise OSError", 1)]
)
def test_resume_a_run_that_failed(how, code, start, tmp_path):
    with start(WHOLE.format(otherwise=how), restarts=0) as job:
        assert job.wait().code == code
    Path("go").touch()
    with resumed(tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert not run().failed()
    assert len(run().attempts()) == 1
    assert run().status().state == "ended"


def test_a_resumed_script_that_never_calls_run_has_failed(start, tmp_path):
    with start('Rank().fail("error")') as job:
        assert job.wait().code == 1
    Path("script.py").write_text("x = 1")
    with resumed(tmp_path) as job:
        assert job.wait().code == 3
    assert "script.py ended without calling he.run(train)" in run().failure().error


def test_resume_a_run_whose_supervisor_was_killed(start, tmp_path):
    """What is left of it is ended first."""
    with start(WHOLE.format(otherwise="rank.until_asked(heed=False)")) as job:
        until(Path("r/status.json").exists)
        before = run().record(0).member.pid
        job.process.kill()
        job.process.wait()
        Path("go").touch()
        with resumed(tmp_path) as second:
            done = second.wait()
        assert done.code == 0, done.err
        assert not leftovers.belongs(before, Path("r"))
        until(lambda: not job.left())


def test_a_run_with_a_supervisor_is_not_resumed(start, tmp_path):
    with start(WHOLE.format(otherwise="rank.until_asked()")) as job:
        until(Path("r/status.json").exists)
        with resumed(tmp_path) as second:
            done = second.wait(clean=False)
        assert done.code == 5
        assert "is in use: its supervisor is at work" in done.err
        os.kill(job.process.pid, signal.SIGINT)
        assert job.wait().code == 130
    run().lock().close()


def test_a_run_that_ended_well_is_not_resumed(start, tmp_path):
    with start("Rank().end()") as job:
        job.wait()
    with resumed(tmp_path) as job:
        done = job.wait()
    assert done.code == 5
    assert "has ended well: there is nothing to resume" in done.err
    run().lock().close()


def test_a_resumed_run_is_started_again_as_well(start, tmp_path):
    with start('rank = Rank()\nrank.fail("lost", step=4) if rank.attempt < 3 else rank.end()', restarts=0) as job:
        assert job.wait().code == 1
    with resumed(tmp_path, "--set", "restarts=1") as job:
        done = job.wait()
    assert done.code == 0, done.err
    (event,) = told(events.Restarted)
    assert event.attempt == 3


def test_it_says_which_checkpoint_it_goes_on_from(start, tmp_path):
    with start('Rank(checkpoint_dir="kept").fail("lost", step=4)', checkpoint_dir="kept", restarts=0) as job:
        assert job.wait().code == 1
    store = Store(tmp_path / "kept" / "r")
    for step in (10, 20):
        about = About(loop=0, cursor=Cursor(step=step), names=(), settings={}, generation=0, time=0.0)
        store.write_part(about, 0, b"", [], [])
        store.commit(about, [0])
    with resumed(tmp_path) as job:
        done = job.wait()
    assert done.code == 1
    place = Path("r").absolute()
    assert f"run directory {place}, from the checkpoint of step 20" in done.err
    assert lines(done)[-1] == f"go on from the checkpoint of step 20, with: hpc-elastic resume {place}"


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_the_lock_is_given_back_by_the_kernel(tmp_path):
    run = RunDirectory.create(tmp_path / "run")
    code = f"""
import pathlib, sys
from hpc_elastic.rundir import RunDirectory
lock = RunDirectory(pathlib.Path({str(run.path)!r})).lock()
print(flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(RunDirectoryError, match="its supervisor is at work"):
        run.lock()
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    run.lock().close()
