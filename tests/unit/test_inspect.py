"""What `hpc-elastic inspect` says of shards, and of what is none."""

from __future__ import annotations

import json
from itertools import islice

import h5py
import numpy as np
import pytest

from hpc_elastic import inspect
from hpc_elastic.errors import ShardError
from hpc_elastic.inspect import describe, table
from hpc_elastic.shards import open_shards, write_shard

IMAGES = np.zeros((30, 4, 3), np.float32)
LABELS = np.arange(30) % 3


@pytest.fixture
def two(tmp_path):
    classes = ("cat", "[dog]", "eel")
    for i, part in enumerate((slice(0, 20), slice(20, 30))):
        arrays = {"image": IMAGES[part], "label": LABELS[part]}
        write_shard(tmp_path / f"{i}.h5", arrays, classes=classes)
    return tmp_path


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def shown(found, capsys):
    table(found)
    return capsys.readouterr().out


def test_set(two, capsys):
    found = describe([str(two)])
    assert json.loads(json.dumps(found)) == found
    assert found["samples"] == 30
    assert found["bytes"] == 30 * (4 * 3 * 4 + 8)
    assert found["file_bytes"] == sum(path.stat().st_size for path in two.iterdir())
    assert found["fields"] == {
        "image": {"shape": [4, 3], "dtype": "float32", "bytes": 48},
        "label": {"shape": [], "dtype": "int64", "bytes": 8},
    }
    assert found["classes"] == ["cat", "[dog]", "eel"]
    assert found["labels"] == {"0": 10, "1": 10, "2": 10}
    assert [file["samples"] for file in found["files"]] == [20, 10]
    assert found["files"][0]["layouts"]["image"] == {"kind": "contiguous", "chunk": None, "compression": ""}
    with open_shards(two) as shards:
        assert found["fingerprint"] == shards.fingerprint
    out = shown(found, capsys)
    for text in ("30 samples", "2 files", "4 x 3", "float32", "[dog]", f"files in {two}", "0.h5", "contiguous"):
        assert text in out


def test_chunked(tmp_path, capsys):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=IMAGES, chunks=(8, 4, 3), compression="gzip", shuffle=True)
        file.create_dataset("label", data=LABELS)
    found = describe([str(tmp_path / "a.h5")])
    assert found["files"][0]["layouts"]["image"] == {"kind": "chunked", "chunk": 8, "compression": "shuffle+deflate"}
    assert "image chunks of 8, shuffle+deflate; label contiguous" in " ".join(shown(found, capsys).split())


@pytest.mark.parametrize("label", [LABELS.astype(float), LABELS.reshape(30, 1)], ids=["real", "several"])
def test_labels_that_are_no_classes(label, tmp_path, capsys):
    write_shard(tmp_path / "a.h5", {"label": label})
    found = describe([str(tmp_path)])
    assert found["labels"] is None
    assert "class" not in shown(found, capsys).replace(str(tmp_path), "")


def test_too_many_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "BLOCK", 7)
    write_shard(tmp_path / "a.h5", {"label": np.arange(20)})
    assert len(describe([str(tmp_path)])["labels"]) == 20
    monkeypatch.setattr(inspect, "MOST_LABELS", 19)
    assert describe([str(tmp_path)])["labels"] is None


def test_labels_are_counted_over_blocks_and_files(two, monkeypatch):
    monkeypatch.setattr(inspect, "BLOCK", 7)
    assert describe([str(two)])["labels"] == {"0": 10, "1": 10, "2": 10}


def test_labels_beyond_the_classes(tmp_path, capsys):
    write_shard(tmp_path / "a.h5", {"label": np.array([-1, 0, 5])}, classes=("only",))
    found = describe([str(tmp_path)])
    assert found["labels"] == {"-1": 1, "0": 1, "5": 1}
    assert shown(found, capsys).count("only") == 1


def test_files_of_several_folders(two, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    write_shard(tmp_path / "sub" / "2.h5", {"image": IMAGES, "label": LABELS}, classes=("cat", "[dog]", "eel"))
    found = describe([str(two / "0.h5"), str(two / "sub")])
    assert found["samples"] == 50
    lines = "".join(line.strip("│ ") for line in shown(found, capsys).splitlines())
    assert "files in" not in lines
    assert [file["path"] for file in found["files"]] == [str(two / "0.h5"), str(two / "sub" / "2.h5")]


@pytest.mark.parametrize("where", ["absent", "absent.h5", "absent/*.h5"])
def test_nothing_there(where, tmp_path):
    with pytest.raises(ShardError, match="hpc-elastic pack"):
        describe([str(tmp_path / where)])


def test_only_labels_are_read(two, monkeypatch):
    """To count the labels, the images are left alone."""
    asked = []
    gather = inspect.ShardSet.gather

    def spy(self, samples, out=None):
        asked.extend(islice(self.fields, 9))
        return gather(self, samples, out)

    monkeypatch.setattr(inspect.ShardSet, "gather", spy)
    describe([str(two)])
    assert asked == ["label"]
