"""Slurm read and commanded on a real cluster, whose daemons are stopped and started."""

import time

import pytest

from hpc_elastic import doctor
from hpc_elastic.broker.slurm.calls import Calls
from hpc_elastic.broker.slurm.commands import Commands
from hpc_elastic.errors import SlurmRefused, SlurmUnreachable

SCRIPT = "#!/bin/sh\nsleep 60\n"


@pytest.fixture
def slurm(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
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
        slurm.allocate(["-N1", "--exclusive", "--time=3"], limit_s=5)
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


def test_slurmctld_stopped(cluster, slurm):
    cluster.stop_controller()
    try:
        began_s = time.monotonic()
        with pytest.raises(SlurmUnreachable):
            slurm.snapshot()
        assert time.monotonic() - began_s < 10
    finally:
        cluster.start_controller()

    def back():
        try:
            return slurm.snapshot().nodes
        except SlurmUnreachable:
            return ()

    until(back)


def test_munge_down(cluster, slurm):
    cluster.stop_munge()
    try:
        with pytest.raises(SlurmUnreachable):
            slurm.snapshot()
    finally:
        cluster.start_munge()
    assert slurm.snapshot().nodes


def test_doctor_on_a_login_node(slurm):  # noqa: ARG001  (its environment)
    check = doctor._slurm()
    assert check.good
    assert "4 nodes" in check.text
    assert "its jobs are ended for those of main, urgent, after 10 s of grace" in check.facts["partition low"]
    assert "pmi2" in check.facts["MPI by srun"]
