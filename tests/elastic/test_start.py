"""Every way to start a job, and what becomes of ranks that can't be ended singly."""

from __future__ import annotations

import pytest

from hpc_elastic.rundir import RunDirectory

from ..afterwards import resizes
from ..launch import SCRIPTS, Job, hpc_elastic, mpiexec, python
from ..rarely import also

EPOCHS = 3
GROW = {
    "HPC_ELASTIC_SLOTS": "5",
    "HPC_ELASTIC_RUN_DIR": "r",
    "HPC_ELASTIC_POLICY": "timetable",
    "HPC_ELASTIC_HOLD": "true",
}


@pytest.fixture(scope="module")
def static(shards, tmp_path_factory):
    """What one process computes when plain python starts it."""
    folder = tmp_path_factory.mktemp("static")
    with Job([*python(), str(SCRIPTS / "softmax.py"), str(shards), str(EPOCHS)], folder=folder) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert len(list((folder / "runs").iterdir())) == 1
    return done.value("sha256")


def starts():
    """Return the beginnings of the command lines."""
    return {"python": python(), "mpirun -n 1": mpiexec(1), "mpiexec -n 2": mpiexec(2), "mpiexec -n 3": mpiexec(3)}


@pytest.mark.parametrize("way", ["python", "mpirun -n 1", "mpiexec -n 3", also("mpiexec -n 2")])
def test_start_and_grow(way, shards, static, tmp_path):
    command = [*starts()[way], str(SCRIPTS / "softmax.py"), str(shards), str(EPOCHS)]
    with Job(command, folder=tmp_path, environ={**GROW, "HPC_ELASTIC_TIMETABLE": "5:4,20:2-0"}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    assert done.value("ranks") == "2"
    assert done.err.splitlines().count(f"run directory {tmp_path / 'r'}") == 1
    assert [event.after for event in resizes(tmp_path / "r")] == [4, 2]


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_ranks_print_whole_lines(unbuffered, tmp_path):
    """Python that runs unbuffered writes each argument of `print` by itself, and other ranks print in between."""
    command = [*mpiexec(3), str(SCRIPTS / "lines.py")]
    with Job(command, folder=tmp_path, environ={"PYTHONUNBUFFERED": unbuffered, "HPC_ELASTIC_PROGRESS": "off"}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.out.splitlines() == 3 * ["a whole line"]
    assert done.err.splitlines().count("a whole line") == 3


def test_rank_0_leaves_and_the_shell_waits(shards, static, tmp_path):
    """The process that the shell started leaves first; the command lasts until the job has ended."""
    command = [*python(), str(SCRIPTS / "softmax.py"), str(shards), str(EPOCHS), "--pause", "0.02"]
    with Job(command, folder=tmp_path, environ={**GROW, "HPC_ELASTIC_TIMETABLE": "5:2,10:1-0"}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    seed = RunDirectory(tmp_path / "r").record(0)
    assert seed is not None
    assert seed.outcome == "retired"
    assert seed.member.parks


def test_shell_script_lives_on(shards, static, tmp_path):
    """MPICH's launcher kills the process group of a seed that ended before it: the seed must not do that."""
    script = f"{python()[0]} {SCRIPTS / 'softmax.py'} {shards} {EPOCHS}; echo code $?"
    with Job(["bash", "-c", script], folder=tmp_path, environ={**GROW, "HPC_ELASTIC_TIMETABLE": "5:2,10:1-0"}) as job:
        done = job.wait()
    assert done.value("sha256") == static
    assert done.value("code") == "0"


def test_parked_ranks_come_back_first(shards, static, tmp_path):
    """Ranks of one launch are put to sleep on a shrink; a grow wakes them before it starts new ones."""
    command = [*mpiexec(3), str(SCRIPTS / "softmax.py"), str(shards), str(EPOCHS)]
    with Job(command, folder=tmp_path, environ={**GROW, "HPC_ELASTIC_TIMETABLE": "5:1,10:4,20:2-1,30:1"}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    found = resizes(tmp_path / "r")
    assert [event.after for event in found] == [1, 4, 2, 1]
    assert set(found[0].left) == {1, 2}
    assert {1, 2} < set(found[1].joined)
    assert len(found[1].joined) == 3
    assert done.err.count("put to sleep") == 1


def test_parked_leader(shards, static, tmp_path):
    """Rank 0 of a launch of two is parked, the next rank leads, and wakes it again."""
    command = [*mpiexec(2), str(SCRIPTS / "softmax.py"), str(shards), str(EPOCHS)]
    with Job(command, folder=tmp_path, environ={**GROW, "HPC_ELASTIC_TIMETABLE": "5:1-0,20:2"}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    found = resizes(tmp_path / "r")
    assert found[0].left == (0,)
    assert found[1].joined == (0,)


def test_module(tmp_path):
    """A script run as a module: newcomers run the same module."""
    options = ["--run-dir", "r", "--slots", 3, "--timetable", "20:3,60:1-0", "--hold"]
    with Job(
        hpc_elastic("run", *options, "-m", "jobs.heat2d.heat", "--size", 33, "--turns", 90, "--check"), folder=tmp_path
    ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert "equal to one process" in done.out
    assert [event.after for event in resizes(tmp_path / "r")] == [3, 1]


@pytest.mark.parametrize("delay_s", [0.04, 0.08, also(0.06), also(0.1)])
def test_end_while_newcomers_are_connected(delay_s, tmp_path):
    """They are sent home quietly: cut off inside MPI, they would make the launcher report a crash."""
    options = ["--run-dir", "r", "--slots", 3, "--timetable", "5:3", "--progress", "off"]
    with Job(hpc_elastic("run", *options, SCRIPTS / "ends_early.py", delay_s), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    first, *more = done.err.splitlines()
    assert first == f"run directory {tmp_path / 'r'}"
    assert all("given up" in line and line.endswith("the job ended before the newcomers were ready") for line in more)
