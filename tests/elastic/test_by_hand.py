"""Resizes that a person asks for."""

from __future__ import annotations

import subprocess

from hpc_elastic import events
from hpc_elastic.faults import VARIABLE
from hpc_elastic.rundir import RunDirectory

from ..afterwards import happened
from ..launch import SCRIPTS, Job, hpc_elastic, until


def test_next_resize_while_a_leaver_is_ending(shards, tmp_path):
    """It is answered when that has ended: its slot is needed."""
    command = hpc_elastic(
        "run", "--run-dir", "r", "--slots", "2", str(SCRIPTS / "softmax.py"), str(shards), "400", "--pause", "0.02"
    )
    with Job(command, folder=tmp_path, environ={VARIABLE: "retire:delay=2:member=1"}) as job:
        until((tmp_path / "r" / "status.json").exists)
        run = RunDirectory(tmp_path / "r")
        for ranks in (2, 1, 2):
            subprocess.run(hpc_elastic("resize", str(run.path), str(ranks), "--wait"), check=True, timeout=60)
        assert [event.after for event in happened(run.path, events.Resized)] == [2, 1, 2]
        subprocess.run(hpc_elastic("stop", str(run.path)), check=True, timeout=60)
        done = job.wait()
    assert done.code == 0, done.err
