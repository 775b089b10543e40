"""What is promised about losses: ranks that die, newcomers that can't come, signals, and checkpoints that are no good."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.comm.vendor import find_mpiexec
from hpc_elastic.config import FAULT_VARIABLE
from hpc_elastic.model import Request
from hpc_elastic.rundir import RunDirectory

from ..afterwards import check_ledger, happened, refusals, resizes
from ..launch import SCRIPTS, Job, hpc_elastic, python, until
from ..other_user import as_user
from ..rarely import also
from ..shards import SAMPLES

EPOCHS, PAUSE_S, LONG_PAUSE_S = 10, 0.04, 0.2
SETTINGS = {"ledger": "true", "stall_s": 2, "deadline_s": 20, "checkpoint_steps": 10}


@pytest.fixture(scope="module")
def static(shards, tmp_path_factory):
    """What one static rank computes."""
    folder = tmp_path_factory.mktemp("static")
    with Job(hpc_elastic("run", "--run-dir", "r", SCRIPTS / "softmax.py", shards, EPOCHS), folder=folder) as job:
        done = job.wait()
    assert done.code == 0, done.err
    return done.value("sha256")


@pytest.fixture
def start(shards, tmp_path):
    """Start the job with some ranks, which take time to come, and 4 slots; its pauses end when there is the file "done"."""

    def begin(*options, ranks=3, script=SCRIPTS / "softmax.py", pause_s=PAUSE_S, environ=None, before=(), **settings):
        pairs = [part for name, value in {**SETTINGS, **settings}.items() for part in ("--set", f"{name}={value}")]
        given = ["--run-dir", "r", "--ranks", ranks, "--slots", 4, *pairs, *options]
        command = hpc_elastic("run", *given, script, shards, EPOCHS, "--pause", pause_s, "--until", tmp_path / "done")
        return Job([*before, *command], folder=tmp_path, environ=environ)

    return begin


@pytest.fixture
def check(static, tmp_path):
    """Check that a job that has ended came to the same result, and consumed each sample once."""

    def right(done):
        assert done.code == 0, done.err
        assert done.value("sha256") == static
        check_ledger(tmp_path / "r", EPOCHS, SAMPLES)

    return right


def under_way(path, ranks=3, step=0):
    """Return the run when it has that many ranks and is past a step."""
    until((path / "status.json").exists)
    run = RunDirectory(path)
    until(lambda: run.status().ranks == ranks and run.status().step > step)
    return run


def pids(run, ranks):
    members = run.status().members
    return [members[rank].pid for rank in ranks]


# --- ranks that die -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(0,), (0, 1), also((2,)), also((1,)), also((1, 2))])
def test_ranks_killed(ranks, start, check, tmp_path):
    """The others go on at once, and replacements come; the job waits for these, however busy the machine is."""
    # On a busy machine newcomers are in MPI_Init for seconds, without a sign of life, and must not be ended for that.
    with start("--hold", stall_s=10) as job:
        run = under_way(tmp_path / "r")
        for pid in pids(run, ranks):
            os.kill(pid, signal.SIGKILL)
        done = job.wait()
    check(done)
    lost = happened(tmp_path / "r", events.Lost)
    assert sum(len(event.members) for event in lost) == len(ranks)
    assert all("was killed by signal 9" in event.how for event in lost)
    assert not happened(tmp_path / "r", events.Restarted)
    assert done.value("ranks") == "3"
    assert sum(len(event.joined) for event in resizes(tmp_path / "r")) == 2 + len(ranks)


def test_no_older_step_is_shown_after_a_loss(start, tmp_path):
    """A supervisor shows the status, so that is of the step that is told, before this is told."""
    with start(pause_s=1) as job:
        run = under_way(tmp_path / "r")
        os.kill(*pids(run, [1]), signal.SIGKILL)
        until(lambda: "3 -> 2 ranks, going on at step" in job.text()[1])
        status = run.status()
        told = int(job.text()[1].split("going on at step ")[1].split()[0])
    assert (status.ranks, status.step >= told) == (2, True)


def test_a_stall_is_a_loss(start, check, tmp_path):
    with start("--hold") as job:
        run = under_way(tmp_path / "r")
        os.kill(*pids(run, [1]), signal.SIGSTOP)
        done = job.wait()
    check(done)
    (event,) = happened(tmp_path / "r", events.Lost)
    assert (event.before, event.after) == (3, 2)


def test_three_losses_at_a_step(start, tmp_path):
    """What is fatal again and again is the program's own doing."""
    fault = ";".join(["sum:kill:step=110:rank=1"] * 3)
    with start("--hold", ranks=4, environ={FAULT_VARIABLE: fault}) as job:
        done = job.wait()
    assert done.code == 1
    failure = RunDirectory(tmp_path / "r").failure()
    assert "the 3rd process lost at step 110; the program itself seems to end them there" in failure.error
    assert failure.error in done.err


def test_three_restarts_at_a_step(start, tmp_path):
    fault = ";".join(["sum:kill:step=3"] * 3)
    with start(ranks=1, pause_s=0.4, environ={FAULT_VARIABLE: fault}) as job:
        done = job.wait()
    assert done.code == 1
    assert len(happened(tmp_path / "r", events.Restarted)) == 2
    assert "given up: step 3 has failed 3 times" in done.err
    assert "hpc-elastic resume" in done.err


# --- newcomers that can't come --------------------------------------------------------------------------------------------

DOCSTRING = '"""'
NEWCOMER = """
import os, pathlib, time
if "hpc_elastic.worker" in pathlib.Path("/proc/self/cmdline").read_text():
    {deed}
"""


@pytest.mark.parametrize(
    ("deed", "fault", "reason"),
    [
        ("os._exit(3)", "", "newcomer 1 ended with exit code 3 before it had joined"),
        also("os.kill(os.getpid(), 9)", "", "newcomer 1 was killed by signal 9 before it had joined"),
        # Longer than the deadline that the job gives newcomers, and than the test may last.
        ("time.sleep(60)", "", "the newcomers were not there after 3 s"),
        ("pass", "warm:stop:role=newcomer", "newcomer 1 gave no sign of life for too long"),
        ("pass", "init:kill:role=newcomer", "newcomer 1 was killed by signal 9 before it had joined"),
        also("pass", "gather:kill:role=newcomer", "newcomer 1 was killed by signal 9 before it had joined"),
    ],
)
def test_newcomer_that_can_not_come(deed, fault, reason, start, check, tmp_path):
    """It costs the job nothing: the others step on."""
    script = tmp_path / "script.py"
    script.write_text(NEWCOMER.format(deed=deed) + (SCRIPTS / "softmax.py").read_text().replace(DOCSTRING, "'''", 2))
    environ = {FAULT_VARIABLE: fault} if fault else {}
    with start(
        ranks=2, script=script, environ=environ, pause_s=LONG_PAUSE_S, deadline_s=3 if "sleep" in deed else 20
    ) as job:
        until(lambda: refusals(tmp_path / "r"))
        (tmp_path / "done").touch()
        done = job.wait()
    check(done)
    assert reason in refusals(tmp_path / "r")[0]
    assert not happened(tmp_path / "r", events.Lost)
    assert not happened(tmp_path / "r", events.Restarted)


IN_INIT = """
import contextlib, os, subprocess
import hpc_elastic.comm.door as door

@contextlib.contextmanager
def dying(_):
    # Another process: MPI_Init holds the interpreter's lock. At the latest it is killed before anybody is told.
    with subprocess.Popen(["sh", "-c", f"sleep {after_s}; kill -9 {{os.getpid()}}"]):
        yield

if "hpc_elastic.worker" in open("/proc/self/cmdline").read() and not os.path.exists("died"):
    open("died", "x").close()
    door.limited = dying
"""


@pytest.mark.parametrize("after_s", [0.01, also(0.06), also(0.0), also(0.03)])
def test_newcomer_that_dies_in_init(after_s, start, check, tmp_path):
    """The leader's call comes to an end all the same; or MPICH crashes in it, and then there is no other rank to go on."""
    script = tmp_path / "script.py"
    script.write_text(IN_INIT.format(after_s=after_s) + (SCRIPTS / "softmax.py").read_text().replace(DOCSTRING, "'''", 2))
    with start(ranks=2, script=script) as job:
        done = job.wait()
    check(done)
    if happened(tmp_path / "r", events.Restarted):
        assert RunDirectory(tmp_path / "r" / "attempts" / "1").end_of(0).signal in (signal.SIGSEGV, signal.SIGABRT)
        return
    lost = happened(tmp_path / "r", events.Lost)  # if it has joined before
    assert [event.members for event in lost] in ([], [(1,)])
    assert "was killed by signal 9" in [*refusals(tmp_path / "r"), *(event.how for event in lost)][0]


def test_one_of_two_newcomers(start, check, tmp_path):
    """The other one comes."""
    with start("--hold", environ={FAULT_VARIABLE: "warm:kill:member=1"}) as job:
        done = job.wait()
    check(done)
    assert "goes on without one: newcomer 1 was killed by signal 9" in refusals(tmp_path / "r")[0]
    assert resizes(tmp_path / "r")[0].joined == (2,)


USER = 54322


def tasks(pids):
    """Return how many processes and threads that user has among the processes `pids`."""
    found = 0
    for pid in pids:
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            if process.stat().st_uid == USER:
                found += len(list((process / "task").iterdir()))
    return found


@pytest.mark.parametrize("more", [0, also(1), also(2)])
def test_as_many_processes_as_there_may_be(more, start, check, tmp_path):
    """A newcomer is refused, with the reason in one line, and the job goes on.

    It has no guard, or the guard has no newcomer, or the newcomer has no threads.
    """
    bound = as_user(USER)
    by_itself = [*bound, *python(), "-c", "import os, sys; sys.exit(not os.access(sys.executable, os.X_OK))"]
    if find_mpiexec()[1].title == "Open MPI" and subprocess.run(by_itself, check=False).returncode:
        pytest.skip("Open MPI starts nothing that the user could not start without that privilege")
    environ = {"OPENBLAS_NUM_THREADS": "1"}  # it ends a process that it can't have as many threads in as there are cores
    with start(ranks=1, before=bound, environ=environ, checkpoint_steps=0, warm="off") as job:
        run = under_way(tmp_path / "r", 1)
        most = min(tasks(job.left()) for _ in range(20)) + more
        subprocess.run([*bound, "prlimit", "--pid", *map(str, pids(run, [0])), f"--nproc={most}"], check=True)
        run.ask(Request("resize", 2))
        done = job.wait()
    check(done)
    assert "no more processes or threads can be had: raise the limit (ulimit -u" in refusals(run.path)[0]
    assert "Traceback" not in done.err
    assert not happened(run.path, events.Restarted)


# --- signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, also(1)])
def test_one_rank_told_to_leave(rank, start, check, tmp_path):
    with start(pause_s=LONG_PAUSE_S) as job:
        run = under_way(tmp_path / "r")
        (pid,) = pids(run, [rank])
        os.kill(pid, signal.SIGTERM)
        until(lambda: any(event.left for event in resizes(run.path)))
        (tmp_path / "done").touch()
        done = job.wait()
    check(done)
    left = [event for event in resizes(tmp_path / "r") if event.left]
    assert [run.record(number).member.pid for event in left for number in event.left] == [pid]
    assert not happened(tmp_path / "r", events.Lost)
    assert json.loads((run.path / "office.json").read_bytes())["told"] == [], "it is done"


def test_all_ranks_told_to_leave(start, check, tmp_path):
    """The job stops with a checkpoint, and goes on from there with other ranks."""
    with start(pause_s=LONG_PAUSE_S) as job:
        run = under_way(tmp_path / "r")
        for pid in pids(run, range(3)):
            os.kill(pid, signal.SIGTERM)
        done = job.wait()
    assert done.code == 0, done.err
    stopped = run.status()
    assert stopped.state == "stopped"
    (tmp_path / "done").touch()
    with Job(hpc_elastic("resume", "r", "--ranks", 2), folder=tmp_path) as job:
        done = job.wait()
    check(done)
    (resumed,) = happened(tmp_path / "r", events.Resumed)
    assert resumed.step == stopped.step


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def killed(job, run):
    """Kill everything of a job that has made two checkpoints, the supervisor first."""
    until(lambda: len(happened(run.path, events.Checkpointed)) >= 2)
    for pid in [job.process.pid, *job.left()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    job.process.wait()
    until(lambda: not job.left())


@pytest.mark.parametrize("ranks", [3, also(1)])
def test_resume_after_everything_was_killed(ranks, start, check, tmp_path):
    with start("--hold", ranks=2) as job:
        run = under_way(tmp_path / "r", 2)
        killed(job, run)
    with Job(hpc_elastic("resume", "r", "--ranks", ranks, "--slots", 3), folder=tmp_path) as job:
        done = job.wait()
    check(done)
    (resumed,) = happened(tmp_path / "r", events.Resumed)
    assert resumed.step > 0


def test_a_truncated_checkpoint(start, check, tmp_path):
    """The one before it is used."""
    with start("--hold", ranks=2) as job:
        run = under_way(tmp_path / "r", 2)
        killed(job, run)
    before, newest = sorted((run.path / "checkpoints").glob("[0-9]*"))[-2:]
    for part in newest.glob("part-*.h5"):
        os.truncate(part, part.stat().st_size // 2)
    with Job(hpc_elastic("resume", "r"), folder=tmp_path) as job:
        done = job.wait()
    check(done)
    (resumed,) = happened(run.path, events.Resumed)
    assert resumed.path == str(before)
    assert f"checkpoint {newest} is damaged" in done.err
    assert newest.with_name(f"{newest.name}.damaged").exists() or not newest.exists()


def test_the_checkpoints_folder_is_lost(start, check, tmp_path):
    """Others are made as soon as it can be made again."""
    folder = tmp_path / "elsewhere"
    with start("--hold", ranks=2, checkpoint_dir=folder) as job:
        run = under_way(tmp_path / "r", 2)
        until(lambda: happened(run.path, events.Checkpointed))
        for number in itertools.count():
            folder.rename(tmp_path / f"lost-{number}")
            with contextlib.suppress(FileExistsError):  # a rank was faster
                folder.touch(exist_ok=False)
                break
        until(lambda: any(event.error for event in happened(run.path, events.Checkpointed)))
        folder.unlink()
        done = job.wait()
    check(done)
    assert "the job goes on" in done.err
    assert not happened(run.path, events.Checkpointed)[-1].error
    assert not happened(run.path, events.Lost)


def test_the_disk_is_full(start, check, small_disk, tmp_path):
    """Training goes on, and checkpoints are made again when there is room."""
    with start("--hold", ranks=2, checkpoint_dir=small_disk) as job:
        run = under_way(tmp_path / "r", 2)
        until(lambda: any(event.error for event in happened(run.path, events.Checkpointed)))
        subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
        done = job.wait()
    check(done)
    assert "the disk is full" in done.err
    assert not happened(run.path, events.Checkpointed)[-1].error
