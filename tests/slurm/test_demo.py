"""The demo, as `make demo-slurm` runs it. It checks itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ..launch import ROOT


def test_demo(request):
    if not request.config.getoption("all_faults"):
        pytest.skip("one of --all-faults: it takes a minute and a half")
    command = [sys.executable, "-m", "slurm.demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits; each sample once an epoch" in done.stdout
