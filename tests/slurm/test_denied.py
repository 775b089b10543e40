"""What accounting, munge and limits deny: the job goes on at its size, and says why it can't grow."""

from __future__ import annotations

import pytest

from .conftest import made
from .test_broker import SHORT, Elastic, computed, until


@pytest.fixture(scope="module")
def accounting(tmp_path_factory):
    """Three nodes with accounts: root may use `lab`, and the QOS `small`, of which a user may have one node."""
    with made(tmp_path_factory.mktemp("accounting"), nodes=3, accounting=True) as cluster:
        manager = ["sacctmgr", "--immediate"]
        cluster.run([*manager, "add", "qos", "small", "set", "MaxTRESPerUser=node=1"])
        cluster.run([*manager, "add", "account", "lab", "Cluster=test"])
        cluster.run([*manager, "add", "user", "root", "Account=lab", "QOS=normal,small"])
        yield cluster


@pytest.fixture(scope="module")
def static_short(accounting, tmp_path_factory):
    return computed(accounting, tmp_path_factory.mktemp("static"), SHORT)


@pytest.mark.parametrize(
    ("options", "said", "most"),
    [
        ("--account=nobody", "account", 1),
        ("--account=lab --qos=nothing", "qos", 1),
        ("--account=lab --qos=small", "qosmaxnodeperuserlimit", 2),
        ("--cpus-per-task=99", "partitionconfig", 1),
        ("--gres=gpu:4", "generic resource", 1),
        ("--nonsense", "nonsense", 1),
    ],
)
def test_companions_that_are_denied(options, said, most, accounting, static_short, tmp_path):
    job = Elastic(accounting, tmp_path)
    job.submit(slurm_options=options, patience_s=2, epochs=SHORT, pause_s=0.5)
    until((job.path / "events.jsonl").exists)
    until(lambda: any(said in reason for reason in job.refused()) and job.most() == most)
    job.steps(10)
    job.ended_well(static_short)
    assert job.most() == most
    assert len(job.refused()) < 6, "it asks again and again"


def test_companions_have_the_account_of_the_job(accounting, static_short, tmp_path):
    job = Elastic(accounting, tmp_path)
    job.submit(sbatch=["--account=lab"], epochs=SHORT, pause_s=0.5)
    job.ranks(3)
    assert set(accounting.run(["squeue", "--noheader", "--format=%a"]).stdout.split()) == {"lab"}
    job.ended_well(static_short)


def test_munge_is_down(fresh, tmp_path, static_short):
    """Nothing can be asked of Slurm meanwhile. The steps go on."""
    job = Elastic(fresh, tmp_path)
    job.submit(epochs=SHORT, pause_s=0.5, policy="greedy")
    job.ranks(4)
    fresh.stop_munge()
    try:
        before = job.run.status().step
        until(lambda: job.run.status().step > before + 15)
    finally:
        fresh.start_munge()
    job.ended_well(static_short)
