"""Batch scripts: what `hpc-elastic submit` writes, and those that come with the project."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpc_elastic.cli import app
from hpc_elastic.submit import Batch
from tests.launch import ROOT

READY_MADE = sorted((ROOT / "slurm").glob("*.sbatch"))


def dry(*words, code=0):
    done = CliRunner().invoke(app, ["submit", "--dry-run", *map(str, words)])
    assert done.exit_code == code, done.output
    return done.stdout


def good(text):
    """Check that bash can read it."""
    return (
        subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False, timeout=20).returncode == 0
    )


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train it.py").touch()
    return "train it.py"


def test_what_is_written(script, tmp_path):
    options = ["--time", "1:00:00", "-p", "gpu", "-A", "me", "--sbatch=--mem=8G", "--max", 4, "--set", "seed=3"]
    text = dry(*options, "--run-dir", "here", script, "--epochs", "5")
    assert text.startswith("#!/bin/bash\n")
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert asked >= {"--time=1:00:00", "--partition=gpu", "--account=me", "--mem=8G", "--nodes=1", "--requeue"}
    (line,) = [line for line in text.splitlines() if " run " in line]
    words = shlex.split(line.strip().removesuffix("&"))
    assert words[words.index("run") :] == [
        *("run", "--run-dir", str(tmp_path / "here"), "--set", "broker=slurm"),
        *("--max", "4", "--set", "seed=3", "train it.py", "--epochs", "5"),
    ]
    assert good(text)


def test_names_that_a_shell_would_take_apart():
    text = Batch("x", Path("/runs/a b; rm -rf $HOME"), ("$(reboot).py",)).script()
    assert good(text)
    (line,) = [line for line in text.splitlines() if " run " in line]
    assert "$(reboot).py" in shlex.split(line.strip().removesuffix("&"))


def test_without_another_go(script):
    text = dry("--no-requeue", script)
    assert "--no-requeue" in text
    assert "scontrol" not in text


def test_a_script_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["submit", "none.py"])
    assert done.exit_code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: path.name)
def test_ready_made(path):
    text = path.read_text()
    assert good(text)
    assert f"`{path.name}`" in (ROOT / "slurm" / "README.md").read_text()
    assert "--set broker=slurm" in text


def test_there_are_three():
    assert len(READY_MADE) == 3
