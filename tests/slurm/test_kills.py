"""Whatever is killed, whenever: no companion stays, and a job that can go on does."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from hpc_elastic.rundir import RunDirectory

from .test_broker import EPOCHS, Elastic, above, computed, until

LIMIT_S = 60.0
MOMENTS_S = 6.0  # from the begin of the job: it has three companions after about two


@pytest.fixture(scope="module")
def static(cluster, tmp_path_factory):
    return computed(cluster, tmp_path_factory.mktemp("static"), EPOCHS)


@pytest.mark.all_faults
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("victim", ["supervisor", "rank 0", "batch script"])
def test_a_kill_at_any_moment(victim, seed, cluster, static, tmp_path):
    moment_s = random.Random(seed).uniform(0, MOMENTS_S)
    print(f"seed {seed}: {victim} is killed after {moment_s:.2f} s")
    job = Elastic(cluster, tmp_path)
    try:
        job.submit(restarts=0 if victim == "supervisor" else 2)
        until(lambda: job.states("--job", job.number) == ["RUNNING"])
        time.sleep(moment_s)
        if victim == "batch script":
            cluster.run(["scancel", "--full", "--signal=KILL", job.number])
        else:
            until(lambda: (job.path / "status.json").exists() and RunDirectory(job.path).status().members)
            rank = job.run.status().members[0].pid
            os.kill(rank if victim == "rank 0" else above(rank, "hpc_elastic.cli"), signal.SIGKILL)
        killed = time.monotonic()
        if victim == "rank 0":
            job.ended_well(static)
        else:
            if victim == "supervisor":
                job.enough.touch()  # the job goes on to its end
            until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(job.companions()), LIMIT_S)
            print(f"no companion after {time.monotonic() - killed:.1f} s")
            assert job.states("--job", job.number) != ["COMPLETED"]
    finally:
        cluster.run(["scancel", "--full", "--user=root"])
        until(lambda: not cluster.run(["squeue", "--noheader"]).stdout)
