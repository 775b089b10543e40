"""The demo, as `make demo-slurm` runs it. It checks itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ..launch import ROOT


@pytest.mark.all_faults
def test_demo():
    command = [sys.executable, "-m", "slurm.demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits; each sample once an epoch" in done.stdout
