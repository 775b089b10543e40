"""Signals to a rank whose leader can't be asked."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from hpc_elastic.rundir import RunDirectory
from hpc_elastic.runtime.signals import heeded


@pytest.mark.parametrize(("number", "what"), [(signal.SIGTERM, "leave"), (signal.SIGINT, "stop")])
def test_a_run_directory_that_can_not_be_written(number, what, tmp_path, capsys):
    """It is said, and the rank goes on."""
    run = RunDirectory.create(tmp_path / "r")
    with heeded(run, 1):
        shutil.rmtree(run.path)
        os.kill(os.getpid(), number)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == f"hpc_elastic: the leader can't be asked to {what}: No such file or directory"
    assert more == (["hpc_elastic: Ctrl-C again ends it now"] if number == signal.SIGINT else [])
