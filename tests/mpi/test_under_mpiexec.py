"""Runs the tests of this folder again, on 2 and 3 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..launch import Job, mpiexec
from .conftest import UNDER_MPIEXEC


@pytest.mark.parametrize("n", [2, 3])
def test_on_ranks(n, tmp_path):
    command = [
        *mpiexec(n),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(Path(__file__).parent.parent.parent),
    ]
    files = [Path(__file__).with_name(name) for name in ("test_world.py", "test_own_arrays.py")]
    command += ["--basetemp", str(tmp_path / "base"), *map(str, files)]
    with Job(command, folder=tmp_path, limit_s=120, environ={UNDER_MPIEXEC: "1"}) as job:
        done = job.wait()
    assert done.code == 0, done.out + done.err
    assert done.out.count(" passed") == n, done.out
