"""Jobs of two loops, ranks that err in odd moments, and what stops a rank that can't be reached."""

from __future__ import annotations

import pytest

from hpc_elastic.events import Notice
from hpc_elastic.rundir import RunDirectory

from ..afterwards import happened, refusals, resizes
from ..launch import SCRIPTS, Job, hpc_elastic, mpiexec, until
from ..rarely import also

TWO = """
import time
import numpy as np
import hpc_elastic as he

def train(job):
    x, grown = np.zeros(4), False
    job.register(x=x)
    for loop, n in enumerate(np.array([{first}, {second}])):
        for i in job.loop(n):
            x += (loop + 1) * (i + 1)
            grown = grown or job.size > 1
            time.sleep(0.1 if loop and not grown else 0.005)  # stands for a computation: the second loop waits for newcomers
    total = job.comm.allgather(x.tobytes())
    assert len(set(total)) == 1
    if job.leads:
        print("x", x[0], "ranks", job.size, flush=True)
he.run(train)
"""


@pytest.mark.parametrize(
    ("first", "second", "table", "hold"),
    [
        (20, 300, "19:2,200:1-0", True),
        (200, 400, "199:2,350:1-0", False),
        also(20, 300, "19:2,200:1-0", False),
        also(200, 400, "199:2,350:1-0", True),
    ],
)
def test_grow_in_the_second_loop(first, second, table, hold, tmp_path):
    file = tmp_path / "two.py"
    file.write_text(TWO.format(first=first, second=second))
    options = ["--run-dir", "r", "--slots", 3, "--timetable", table, *(["--hold"] if hold else [])]
    with Job(hpc_elastic("run", *options, file), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    expected = sum(range(first + 1)) + 2 * sum(range(second + 1))
    assert done.value("x") == f"{float(expected)} ranks 1"
    assert [event.after for event in resizes(tmp_path / "r")] == [2, 1], refusals(tmp_path / "r")


def test_parked_rank_comes_back_in_the_second_loop(tmp_path):
    file = tmp_path / "two.py"
    file.write_text(TWO.format(first=50, second=50))
    environ = {"HPC_ELASTIC_RUN_DIR": "r", "HPC_ELASTIC_SLOTS": "2"}
    environ |= {"HPC_ELASTIC_POLICY": "timetable", "HPC_ELASTIC_TIMETABLE": "10:1,49:2", "HPC_ELASTIC_HOLD": "1"}
    with Job([*mpiexec(2), str(file)], folder=tmp_path, environ=environ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("x").endswith("ranks 2")


STATE = """
import time
import numpy as np
import hpc_elastic as he

class State:
    def state(self):
        return {{"a": 1}}
    def load(self, state):
        raise OSError("can't load")

def train(job):
    {before}
    for i in job.loop(100):
        {inside}
        time.sleep(0.01)  # stands for a computation: a newcomer can come before turn 100
he.run(train)
"""


@pytest.mark.parametrize(
    ("before", "inside", "error"),
    [
        ("pass", "job.register(x=np.zeros(3)) if i == 5 else None", "before the loop"),
        ("pass", "job.array((3,)) if i == 5 else None", "before the loop"),
        ("pass", "next(job.loop(3)) if i == 5 else None", "inside another"),
        (
            "pass",
            "if job.rank == 0 and job.size == 2: raise OSError('alone')\n        if job.size == 2: job.comm.barrier()",
            "alone",
        ),
    ],
)
def test_every_rank_ends_soon(before, inside, error, tmp_path):
    """Errors at odd moments: inside the loop, while another rank waits in a call of its own."""
    file = tmp_path / "job.py"
    file.write_text(STATE.format(before=before, inside=inside))
    run = tmp_path / "r"
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--timetable", "10:2", "--hold", file), folder=tmp_path
    ) as job:
        until((run / "failure.json").exists)
        job.limit_s = job.seconds() + 15  # a stall counts as a loss after 30 s; nobody waits for that
        done = job.wait()
    assert done.code == 1
    failure = RunDirectory(run).failure()
    assert failure is not None
    assert error in failure.error


@pytest.mark.parametrize(
    ("before", "error"),
    [
        ("job.register(x=State())", "can't load"),
        ("job.register(x=np.zeros(3 if job.joined else 4))", "newcomers must register arrays like those"),
    ],
)
def test_newcomer_that_cannot_receive(before, error, tmp_path):
    """Its resize is rolled back, and the job goes on."""
    file = tmp_path / "job.py"
    file.write_text(STATE.format(before=before, inside="pass"))
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--timetable", "10:2", "--hold", file), folder=tmp_path
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    (reason,) = refusals(tmp_path / "r")
    assert error in reason


@pytest.mark.parametrize(("microbatches", "said"), [(3, 0), (2, 1)])
def test_ranks_without_work(microbatches, said, shards, tmp_path):
    """It is said once what to do about them."""
    options = ["--run-dir", "r", "--slots", 3, "--timetable", "3:3", "--hold", "--microbatches", microbatches]
    with Job(hpc_elastic("run", *options, SCRIPTS / "softmax.py", shards, 2), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    text = "1 of 3 ranks has nothing to do, since a step has 2 microbatches: raise microbatches, or lower max to 2\n"
    assert done.err.count(text) == done.err.count("nothing to do") == said
    assert [event.text for event in happened(tmp_path / "r", Notice)] == [text.rstrip()] * said


def test_run_directory_removed(tmp_path):
    """Without its run directory a job can't be controlled, and ends."""
    file = tmp_path / "job.py"
    file.write_text(STATE.format(before="pass", inside="job.comm.allreduce(1)").replace("100", "100_000"))
    with Job(hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--timetable", "10:2", file), folder=tmp_path) as job:
        until(lambda: len(resizes(tmp_path / "r")) == 1)
        (tmp_path / "r").rename(tmp_path / "moved")
        done = job.wait()
    assert done.code == 1


def test_newcomer_deaf_to_sigterm(tmp_path):
    """A newcomer still warming up when the job ends is ended, whether it heeds SIGTERM or not."""
    file = tmp_path / "job.py"
    # It sleeps longer than the test may last, and does not hear SIGTERM: what ends it is SIGKILL.
    before = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); job.joined or time.sleep(60)"
    file.write_text(STATE.format(before=before, inside="pass"))
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--timetable", "10:2", file), folder=tmp_path, limit_s=30
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
