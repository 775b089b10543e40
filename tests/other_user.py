"""How to be another user than root, whom limits of processes bind, and who may write all files nevertheless."""

from __future__ import annotations

import os
import subprocess

import pytest


def as_user(number):
    """Return how a command begins that user `number` runs; tests at a time take different ones, as limits count by user."""
    command = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]
    command += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    if os.geteuid() or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root can be another user")
    return command
