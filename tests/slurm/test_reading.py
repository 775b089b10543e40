"""Slurm read and commanded on a real cluster: `HPC_ELASTIC_TEST_SLURM` names the directory of one of this host's own.

The directory has slurm.conf, pid/slurmctld.pid, pid/munged.pid, munge/key and msock/munge.sock; its daemons are stopped and
started here.
"""

import os
import subprocess
import time
from pathlib import Path

import pytest

from hpc_elastic.broker.slurm.calls import Calls
from hpc_elastic.broker.slurm.commands import Commands
from hpc_elastic.errors import SlurmRefused, SlurmUnreachable

pytestmark = pytest.mark.skipif("HPC_ELASTIC_TEST_SLURM" not in os.environ, reason="no cluster for tests")
SCRIPT = "#!/bin/sh\nsleep 60\n"


@pytest.fixture
def home(monkeypatch):
    path = Path(os.environ["HPC_ELASTIC_TEST_SLURM"])
    monkeypatch.setenv("SLURM_CONF", str(path / "slurm.conf"))
    return path


@pytest.fixture
def slurm(home):  # noqa: ARG001  (it says where the cluster is)
    slurm = Commands(Calls(limit_s=3))
    yield slurm
    slurm.cancel([job.id for job in slurm.snapshot().jobs if job.pending or job.running])


def until(look, limit_s=20):
    """Poll the real cluster until `look` gives something true."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if found := look():
            return found
    raise AssertionError("it did not come to pass")


def stop(pid_file):
    """End a daemon, and wait until it is gone or a zombie."""
    pid = int(pid_file.read_text())
    os.kill(pid, 15)

    def gone():
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    until(gone)


def test_a_job_from_submission_to_its_end(slurm):
    number = slurm.submit(SCRIPT, ["-N1", "--time=5", "--comment=mine", "--output=/dev/null"])
    job = until(lambda: (job := slurm.own_job(number)) and job.running and job)
    assert (job.comment, job.time_limit_s, job.node_count) == ("mine", 300, 1)
    slurm.update(number, {"TimeLimit": "3"})
    assert slurm.own_job(number).time_limit_s == 180
    assert any(node.name == job.nodes and not node.idle for node in slurm.snapshot().nodes)
    slurm.cancel([number])
    until(lambda: not ((job := slurm.own_job(number)) and job.running))
    slurm.cancel([number])


def test_allocation(slurm):
    number = slurm.allocate(["-N1", "-n1", "--time=3"], limit_s=20)
    assert slurm.own_job(number).running


def test_allocation_that_is_not_granted(slurm):
    nodes = len(slurm.snapshot().nodes)
    slurm.allocate([f"-N{nodes}", "--exclusive", "--time=3"], limit_s=20)
    with pytest.raises(SlurmRefused, match="withdrawn"):
        slurm.allocate(["-N1", "--exclusive", "--time=3"], limit_s=1)
    until(lambda: not slurm.snapshot().pending)


def test_refusals(slurm):
    with pytest.raises(SlurmRefused, match="sinfo lists the partitions"):
        slurm.submit(SCRIPT, ["--partition=nowhere"])
    with pytest.raises(SlurmRefused):
        slurm.allocate(["--mem=99999999"], limit_s=5)
    with pytest.raises(SlurmRefused):
        slurm.update(999999, {"TimeLimit": "3"})
    assert slurm.own_job(999999) is None


def test_partitions_and_config(slurm):
    assert any(partition.default and partition.up for partition in slurm.partitions())
    assert slurm.config()["SLURM_VERSION"] == slurm.release()


def test_slurmctld_stopped(home, slurm):
    stop(home / "pid/slurmctld.pid")
    try:
        began_s = time.monotonic()
        with pytest.raises(SlurmUnreachable):
            slurm.snapshot()
        assert time.monotonic() - began_s < 5
    finally:
        subprocess.run(["slurmctld", "-f", str(home / "slurm.conf")], check=True, timeout=20)

    def back():
        try:
            return slurm.snapshot().nodes
        except SlurmUnreachable:
            return ()

    until(back)


def test_munge_down(home, slurm):
    stop(home / "pid/munged.pid")
    try:
        with pytest.raises(SlurmUnreachable):
            slurm.snapshot()
    finally:
        files = [f"--key-file={home}/munge/key", f"--socket={home}/msock/munge.sock", f"--pid-file={home}/pid/munged.pid"]
        files += [f"--log-file={home}/log/munged.log", f"--seed-file={home}/munge/seed"]
        subprocess.run(["munged", "--force", *files], check=True, timeout=20)
    assert slurm.snapshot().nodes
