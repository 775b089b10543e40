"""User code that fails: every rank ends soon with the same error, and nothing is left behind."""

from __future__ import annotations

import pytest

from hpc_elastic import events
from hpc_elastic.rundir import RunDirectory

from ..afterwards import refusals
from ..launch import SCRIPTS, Job, hpc_elastic, mpiexec, python, until
from ..rarely import also

SOON_S = 5.0


@pytest.mark.parametrize("rank", [0, 2, also(1)])
def test_exception_on_one_rank(rank, shards, tmp_path):
    script = [SCRIPTS / "softmax.py", shards, 3, "--fail", f"{rank}:30", "--pause", 0.01]
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 3, "--timetable", "3:3", "--hold", *script), folder=tmp_path
    ) as job:
        run = tmp_path / "r"
        until((run / "failure.json").exists)
        done = job.wait()
    assert done.code == 1
    failure = RunDirectory(run).failure()
    assert failure is not None
    assert (failure.rank, failure.generation, failure.step) == (rank, 1, 30)
    assert "ValueError: deliberate failure" in failure.error
    assert f"rank {rank} on {failure.host}" in failure.error
    records = RunDirectory(run).records()
    assert [record.outcome for record in records] == ["failed"] * 3
    assert {record.error for record in records} == {failure.error}
    ends = [record.time for record in records]
    assert max(ends) - min(ends) < SOON_S
    assert done.err.count("Traceback") == 1, done.err
    assert done.err.count(f"hpc_elastic: {failure.error}") == 1, done.err
    (event,) = [e for e in events.read(run / "events.jsonl") if isinstance(e, events.Failed)]
    assert event.error == failure.error


@pytest.mark.parametrize("rank", [0, 1])
def test_ends_itself_on_one_rank(rank, shards, tmp_path):
    """sys.exit in the midst of the job."""
    script = [SCRIPTS / "softmax.py", shards, 3, "--fail", f"{rank}:30", "--how", "exit", "--pause", 0.01]
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 2, "--timetable", "3:2", "--hold", *script), folder=tmp_path
    ) as job:
        done = job.wait()
    assert done.code == 1
    failure = RunDirectory(tmp_path / "r").failure()
    assert failure is not None, done.err
    assert "SystemExit" in failure.error


@pytest.mark.parametrize("way", ["python", "mpiexec"])
def test_exception_without_the_supervisor(way, shards, tmp_path):
    start = python() if way == "python" else mpiexec(2)
    command = [*start, str(SCRIPTS / "softmax.py"), str(shards), "3", "--fail", "0:30", "--pause", "0.01"]
    environ = {"HPC_ELASTIC_RUN_DIR": "r", "HPC_ELASTIC_SLOTS": "3", "HPC_ELASTIC_TIMETABLE": "3:3"}
    environ |= {"HPC_ELASTIC_POLICY": "timetable", "HPC_ELASTIC_HOLD": "1"}
    with Job(command, folder=tmp_path, environ=environ) as job:
        done = job.wait()
    assert done.code != 0
    assert "deliberate failure" in done.err
    assert [record.outcome for record in RunDirectory(tmp_path / "r").records()] == ["failed"] * 3


SCRIPT = """
import sys, time
import numpy as np
import hpc_elastic as he
{before}
def train(job):
    x = np.zeros(3)
    {setup}
    for i in job.loop(60):
        job.comm.allreduce(1)
        time.sleep(0.02)  # stands for a computation: 60 turns last longer than newcomers take to come
    if job.leads:
        print("ranks", job.size, flush=True)
he.run(train)
"""


@pytest.mark.parametrize(
    ("before", "setup", "reason"),
    [
        ("", "job.register(x=x) if job.joined else job.register(y=x)", "a newcomer has y where the members have x"),
        ("", "1 / (1 if job.joined else 0)", "ZeroDivisionError"),
        ("if 'hpc_elastic.worker' in sys.modules or sys.argv[0] == '': raise OSError('no licence')", "", ""),
        ("import os\nif os.environ.get('X') is None and sys.argv[1:] == []: pass", "", None),
    ],
)
def test_newcomer_that_cannot_come(before, setup, reason, tmp_path):
    """The job goes on without a newcomer that fails before it has joined, and says why."""
    if reason == "":
        before = "if '__mp_main__' in sys.modules or sys.modules['__main__'].__name__ != '__main__': pass\n"
        before += (
            "import pathlib\nif pathlib.Path('second').exists(): raise OSError('no licence')\npathlib.Path('second').touch()"
        )
        reason = "no licence"
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(before=before, setup=setup or "pass"))
    options = ["--run-dir", "r", "--slots", 2, "--timetable", "3:2", "--hold"]
    with Job(hpc_elastic("run", *options, file), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("ranks") == ("2" if reason is None else "1")
    found = refusals(tmp_path / "r")
    assert (not found) if reason is None else (reason in found[0])


def test_job_ends_while_newcomers_warm_up(tmp_path):
    """Newcomers that come too late are sent away, deep in their imports or not."""
    file = tmp_path / "script.py"
    # Newcomers sleep longer than the test may last: they are ended, not waited for.
    file.write_text(SCRIPT.format(before="", setup="job.joined or time.sleep(60)"))
    with Job(
        hpc_elastic("run", "--run-dir", "r", "--slots", 3, "--timetable", "3:3", file), folder=tmp_path, limit_s=30
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("ranks") == "1"
