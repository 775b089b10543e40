"""What benchmarks.peers counts, and the rows that it prints."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers import systems
from benchmarks.peers.schedule import counted
from benchmarks.peers.systems import SYSTEMS
from benchmarks.peers.table import records


def counts(folder, *ledgers, epochs=1, samples=6):
    (folder / "data").mkdir()
    np.save(folder / "data" / "train-label.npy", np.zeros(samples, np.int64))
    files = []
    for number, rows in enumerate(ledgers):
        files.append(folder / f"{number}.i64")
        np.array(rows, np.int64).tofile(files[-1])
    return counted(files, folder, epochs)


def step(number, attempt, *samples, epoch=0):
    return [(epoch, number, attempt, sample) for sample in samples]


def test_each_sample_once(tmp_path):
    whole = [*step(0, 1, 0, 1, 2, 3), *step(1, 1, 4, 5), *step(2, 1, *range(6), epoch=1)]
    assert counts(tmp_path, whole, epochs=2) == {"repeated": 0, "lost": 0, "in_vain": 0}


def test_the_last_attempt_counts(tmp_path):
    first = [*step(0, 1, 0, 1), *step(1, 1, 2), *step(1, 2, 2, 3)]
    second = [*step(1, 1, 3), *step(2, 2, 4)]
    assert counts(tmp_path, first, second) == {"repeated": 0, "lost": 1, "in_vain": 2}


def test_repeats(tmp_path):
    assert counts(tmp_path, step(0, 1, 0, 1, 2), step(1, 1, 2, 3, 4, 4)) == {"repeated": 2, "lost": 1, "in_vain": 0}


def test_rows_of_runs_that_broke_off():
    change = {"standstill_s": 0.5, "until_s": 2.0, "workers": 2}
    rest = {"removed": [], "killed": []}
    good = {"added": [change, change], **rest, "troubles": [], "accuracy": 0.9, "repeated": 1, "lost": 2, "in_vain": 3}
    bad = {"added": [], **rest, "troubles": ["added: not within 90 s"]}
    found = records(SYSTEMS["torchrun"], [good, bad])
    values = {row.metric: row.value for row in found}
    assert values == {
        "standstill_s": 0.5,
        "until_s": 2.0,
        "repeated": 1.0,
        "lost": 2.0,
        "in_vain": 3.0,
        "accuracy": 0.9,
        "ended_well": 0.5,
    }
    assert found[-1].context["troubles"] == ["added: not within 90 s"]


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (None, "no .venv-torch: make it with benchmarks/peers/setup.sh"),
        ("…\nno compiler\n", "no .venv-torch: it could not be built: no compiler"),
    ],
)
def test_a_system_that_is_not_there_says_why(log, why, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "ROOT", tmp_path)
    if log:
        (tmp_path / ".venv-torch").mkdir()
        (tmp_path / ".venv-torch" / "build.log").write_text(log)
    assert SYSTEMS["torchrun"].missing() == why
    assert not SYSTEMS["hpc_elastic"].missing()
