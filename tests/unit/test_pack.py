"""Packing: what comes out is what went in, and a failure leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpc_elastic import pack as packing
from hpc_elastic.errors import ShardError
from hpc_elastic.pack import arrays_source, pack, read_idx, read_labels, write_shards
from hpc_elastic.shards import open_shards

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 6, 4), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 23).astype(np.uint8)
KINDS = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    head = struct.pack(">HBB", 0, KINDS[array.dtype.str[1:]], array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def save_image(path, array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return save(path, file.getvalue())


def everything(folder):
    with open_shards(folder) as opened:
        return opened.gather(np.arange(len(opened)))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def images(tmp_path):
    return save(tmp_path / "in" / "images-idx3-ubyte.gz", gzip.compress(idx(IMAGES)))


@pytest.fixture
def labels(tmp_path):
    return save(tmp_path / "in" / "labels-idx1-ubyte", idx(LABELS))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def photos(tmp_path):
    """Two classes of gray images, hidden files and other things beside."""
    folder = tmp_path / "photos"
    for i, image in enumerate(IMAGES):
        save_image(folder / ("b cat" if i < 10 else "dog") / f"{i:02}.PNG", image)
    save(folder / "dog" / "notes.txt", b"")
    save(folder / ".cache" / "00.png", b"")
    save(folder / "README", b"")
    return folder


@pytest.mark.parametrize("shards", [1, 3, 23])
def test_idx(images, labels, out, shards):
    seen = []
    made = pack([images], out, labels=labels, shards=shards, progress=lambda *now: seen.append(now))
    assert [path.name for path in made] == [f"shard-{i:05}-of-{shards:05}.h5" for i in range(shards)]
    assert tree(out) == [path.name for path in made]
    with open_shards(made) as opened:
        lengths = [file.samples for file in opened.files]
        assert opened.chunk_samples is None
    assert sum(lengths) == 23
    assert max(lengths) - min(lengths) <= 1
    assert seen == [(int(end), 23) for end in np.cumsum(lengths)]
    got = everything(out)
    np.testing.assert_array_equal(got["image"], IMAGES)
    np.testing.assert_array_equal(got["label"], LABELS)
    assert got["label"].dtype == np.int64


def test_idx_files_are_joined(tmp_path, labels, out):
    parts = [save(tmp_path / f"part{i}", idx(part)) for i, part in enumerate((IMAGES[:9], IMAGES[9:]))]
    pack([*parts, labels], out)
    got = everything(out)
    np.testing.assert_array_equal(got["image"], IMAGES)
    np.testing.assert_array_equal(got["label"], LABELS)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 1, 2, 3)])
def test_idx_types(tmp_path, dtype, shape):
    array = RNG.integers(0, 100, shape).astype(dtype)
    got = read_idx(save(tmp_path / "a", idx(array)))
    np.testing.assert_array_equal(got, array)
    assert got.dtype == array.dtype
    assert got.dtype.isnative


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("image", "label"), ("X", "Y")])
def test_npz_names(tmp_path, out, names):
    np.savez(tmp_path / "a.npz", **dict(zip(names, (IMAGES, LABELS), strict=True)), weight=LABELS.astype(">f4"))
    pack([tmp_path / "a.npz"], out)
    got = everything(out)
    assert sorted(got) == ["image", "label", "weight"]
    np.testing.assert_array_equal(got["image"], IMAGES)
    assert got["label"].dtype == np.int64
    assert got["weight"].dtype == np.dtype("=f4")
    np.testing.assert_array_equal(got["weight"], LABELS)


def test_npz_names_that_would_collide_are_kept(tmp_path, out):
    np.savez_compressed(tmp_path / "a.npz", x=IMAGES, image=IMAGES)
    pack([tmp_path / "a.npz"], out)
    assert sorted(everything(out)) == ["image", "x"]


def test_folders_of_images(photos, out):
    pack([photos], out, shards=2)
    got = everything(out)
    np.testing.assert_array_equal(got["image"], IMAGES)
    assert got["label"].tolist() == [0] * 10 + [1] * 13
    assert open_shards(out).classes == ("b cat", "dog")


def test_folder_without_classes(photos, out, tmp_path):
    pack([photos / "dog"], out)
    assert list(everything(out)) == ["image"]
    assert open_shards(out).classes == ()
    text = save(tmp_path / "labels.txt", b"\n".join(b"%d" % label for label in LABELS[10:]))
    pack([photos / "dog"], out, labels=text, overwrite=True)
    np.testing.assert_array_equal(everything(out)["label"], LABELS[10:])


def test_colours(tmp_path, out):
    colour = RNG.integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
    for i, image in enumerate(colour):
        save_image(tmp_path / "rgb" / f"{i}.png", image)
    save_image(tmp_path / "rgb" / "3.png", IMAGES[0])
    pack([tmp_path / "rgb"], out)
    got = everything(out)["image"]
    np.testing.assert_array_equal(got[:3], colour)
    np.testing.assert_array_equal(got[3], np.repeat(IMAGES[0][:, :, None], 3, axis=2))
    pack([tmp_path / "rgb"], out, gray=True, overwrite=True)
    got = everything(out)["image"]
    assert got.shape == (4, 6, 4)
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2 luma, which Pillow documents
    assert np.abs(got[:3] - colour @ weights).max() <= 1
    np.testing.assert_array_equal(got[3], IMAGES[0])


def test_size_is_height_and_width(photos, out):
    save_image(photos / "dog" / "flat.png", np.full((3, 50), 7, np.uint8))
    pack([photos], out, size=(2, 9))
    got = everything(out)["image"]
    assert got.shape == (24, 2, 9)
    assert (got[-1] == 7).all()


def test_jpeg(tmp_path, out):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "in" / "a.jpeg")
    pack([tmp_path / "in"], out)
    assert np.abs(everything(out)["image"].astype(int) - 99).max() <= 2


@pytest.mark.parametrize("suffix", ["idx", "npy", "txt", "idx.gz"])
def test_kinds_of_labels(tmp_path, suffix):
    if suffix == "npy":
        np.save(tmp_path / "a.npy", LABELS)
        path = tmp_path / "a.npy"
    else:
        content = "\n".join(map(str, LABELS)).encode() if suffix == "txt" else idx(LABELS)
        path = save(tmp_path / "a", gzip.compress(content) if suffix == "idx.gz" else content)
    np.testing.assert_array_equal(read_labels(path), LABELS)
    assert read_labels(path).dtype == np.int64


def sources_for(case, tmp_path, photos):  # noqa: C901, PLR0911, PLR0912 - a table of cases, read one by one
    """Return what `pack` is asked in the bad case of this name."""
    idx_file = tmp_path / "a-idx"
    npz = tmp_path / "a.npz"
    match case:
        case "none":
            return [], {}
        case "missing":
            return [tmp_path / "none"], {}
        case "truncated idx":
            return [save(idx_file, idx(IMAGES)[:-1])], {}
        case "idx of a header's half":
            return [save(idx_file, idx(IMAGES)[:9])], {}
        case "idx too long":
            return [save(idx_file, idx(IMAGES) + b"0")], {}
        case "truncated gzip":
            return [save(idx_file, gzip.compress(idx(IMAGES))[:-20])], {}
        case "damaged gzip":
            return [save(idx_file, gzip.compress(idx(IMAGES))[:30] + b"\xff" * 400)], {}
        case "foreign" | "empty":
            return [save(idx_file, b"hello" if case == "foreign" else b"")], {}
        case "truncated npz" | "npz of objects" | "npz of lengths" | "npz of a value" | "npz of nothing":
            arrays = {
                "truncated npz": {"x": IMAGES},
                "npz of objects": {"x": np.array([{}, {}])},
                "npz of lengths": {"x_train": IMAGES, "x_test": IMAGES[:5]},
                "npz of a value": {"x": IMAGES, "n": 3},
                "npz of nothing": {},
            }
            np.savez(npz, **arrays[case])
            if case == "truncated npz":
                npz.write_bytes(npz.read_bytes()[:-100])
            return [npz], {}
        case "unlike":
            np.savez(npz, x=IMAGES[:, :3])
            return [save(idx_file, idx(IMAGES)), npz], {}
        case "labels too few":
            return [save(idx_file, idx(IMAGES))], {"labels": save(tmp_path / "l", idx(LABELS[:-1]))}
        case "labels missing":
            return [save(idx_file, idx(IMAGES))], {"labels": tmp_path / "l"}
        case "labels of words":
            return [save(idx_file, idx(IMAGES))], {"labels": save(tmp_path / "l", b"cat\ndog\n")}
        case "labels of images":
            return [save(idx_file, idx(IMAGES))], {"labels": idx_file}
        case "labels twice":
            np.savez(npz, x=IMAGES, y=LABELS)
            return [npz], {"labels": save(tmp_path / "l", idx(LABELS))}
        case "labels and classes":
            return [photos], {"labels": save(tmp_path / "l", idx(LABELS))}
        case "folder and file":
            return [photos, save(idx_file, idx(IMAGES))], {}
        case "size of idx":
            return [save(idx_file, idx(IMAGES))], {"size": (3, 3)}
        case "sizes differ":
            save_image(photos / "dog" / "zz.png", IMAGES[0].T)
        case "truncated image":
            path = save_image(photos / "dog" / "zz.png", RNG.integers(0, 256, (6, 4), dtype=np.uint8))
            path.write_bytes(path.read_bytes()[:60])
        case "no image":
            save(photos / "dog" / "zz.jpg", b"\xff\xd8 hello")
        case "16 bits":
            save_image(photos / "dog" / "zz.png", np.zeros((6, 4), np.uint16))
        case "loose image":
            save_image(photos / "zz.png", IMAGES[0])
        case "empty class":
            (photos / "fox").mkdir()
        case "too many shards":
            return [photos], {"shards": 24}
        case _:
            raise AssertionError(case)
    return [photos], {}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("none", "nothing to pack: name idx files"),
        ("missing", "none does not exist"),
        ("truncated idx", r"a-idx has 567 bytes, not the 568 of its header: copy or download it again"),
        ("idx of a header's half", r"a-idx has 9 bytes"),
        ("idx too long", r"a-idx has 569 bytes"),
        ("truncated gzip", r"a-idx can't be read, copy or download it again"),
        ("damaged gzip", r"a-idx can't be read"),
        ("foreign", r"a-idx is neither an idx file nor an npz file"),
        ("empty", r"a-idx is neither an idx file nor an npz file"),
        ("truncated npz", r"a\.npz is truncated, or not an npz file"),
        ("npz of objects", r"a\.npz is truncated, or not an npz file of plain arrays"),
        ("npz of lengths", r"a\.npz: arrays of different lengths, \{'x_train': 23, 'x_test': 5\}"),
        ("npz of a value", r"a\.npz: 'n' is a single value"),
        ("npz of nothing", r"a\.npz has no arrays"),
        ("unlike", r"a\.npz: 'image' is uint8 \[23, 3, 4\], but uint8 \[23, 6, 4\] in .*a-idx: pack them apart"),
        ("labels too few", r"l has 22 labels for 23 samples"),
        ("labels missing", r"l does not exist"),
        ("labels of words", r"l holds no labels"),
        ("labels of images", r"a-idx has uint8 \[23, 6, 4\]: labels must be one row of whole numbers"),
        ("labels twice", r"l: the samples already have labels"),
        ("labels and classes", r"photos has sub-folders, whose names are the labels"),
        ("folder and file", r"photos is a folder, which can't be joined"),
        ("size of idx", r"a-idx is not a folder of images"),
        ("sizes differ", r"zz\.png is 4 x 6 \(height x width\), .*00\.PNG is 6 x 4: give a size"),
        ("truncated image", r"zz\.png is truncated or damaged, replace or remove it"),
        ("no image", r"zz\.jpg is not an image that can be read"),
        ("16 bits", r"zz\.png has more than 8 bits a channel"),
        ("loose image", r"zz\.png is beside the folders of the classes"),
        ("empty class", r"fox has no PNG or JPEG images"),
        ("too many shards", r"23 samples can't make 24 shards: ask for a number from 1 to 23"),
    ],
)
def test_bad_sources_leave_nothing(tmp_path, photos, out, case, says):
    sources, options = sources_for(case, tmp_path, photos)
    before = tree(tmp_path)
    with pytest.raises(ShardError, match=says):
        pack(sources, out, **{"shards": 3, **options})
    assert tree(tmp_path) == before


def test_shards_there_are_kept_or_replaced(images, labels, out):
    pack([images], out, shards=4)
    before = tree(out)
    with pytest.raises(ShardError, match=r"shard-00000-of-00004\.h5 is already in .*out"):
        pack([images], out, labels=labels, shards=2)
    assert tree(out) == before
    pack([images], out, labels=labels, shards=2, overwrite=True)
    assert tree(out) == ["shard-00000-of-00002.h5", "shard-00001-of-00002.h5"]
    assert sorted(everything(out)) == ["image", "label"]
    (out / "mine.h5").write_bytes(b"")
    with pytest.raises(ShardError, match=r"mine\.h5 is already in"):
        pack([images], out, overwrite=True)
    assert (out / "mine.h5").exists()


def test_failed_overwrite_keeps_the_old_shards(images, photos, out):
    pack([images], out, shards=2)
    path = save_image(photos / "dog" / "zz.png", IMAGES[0])
    path.write_bytes(path.read_bytes()[:60])  # found out only when the second shard is made
    with pytest.raises(ShardError, match="zz"):
        pack([photos], out, shards=2, overwrite=True)
    assert tree(out) == ["shard-00000-of-00002.h5", "shard-00001-of-00002.h5"]
    np.testing.assert_array_equal(everything(out)["image"], IMAGES)
    assert not [name for name in tree(out.parent) if ".tmp" in name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_moving_leaves_nothing(out, monkeypatch, error):
    original, moves = Path.replace, []

    def replace(self, target):
        if Path(target).parent == out:
            moves.append(target)
            if len(moves) == 3:
                raise error
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(ShardError if isinstance(error, OSError) else KeyboardInterrupt):
        write_shards(arrays_source({"image": IMAGES}), out, 4)
    assert len(moves) == 3
    assert tree(out.parent) == ["out"]


def test_out_is_a_file(tmp_path, images):
    save(tmp_path / "out", b"mine")
    with pytest.raises(ShardError, match=r"can't be written to .*out"):
        pack([images], tmp_path / "out")
    assert tree(tmp_path) == ["in", "in/images-idx3-ubyte.gz", "out"]


def test_out_is_the_current_folder(tmp_path, images, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pack([images], Path())
    assert tree(tmp_path / "here") == ["shard-00000-of-00001.h5"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_pillow_is_not_imported_before_it_is_needed():
    ask = f"import sys, {packing.__name__}; print('PIL' in sys.modules, 'h5py' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["False", "True"]
