"""Shards: what is read is what was written, and each kind of damage is told."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import signal
from dataclasses import FrozenInstanceError
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_elastic.errors import ShardError
from hpc_elastic.shards import Field, chunked, open_shards, write_shard

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (100, 5, 3), dtype=np.uint8)
LABELS = np.arange(100, dtype=np.int64)


def fields(start=0, stop=100):
    return {"image": IMAGES[start:stop], "label": LABELS[start:stop]}


def names(folder):
    return [path.name for path in folder.iterdir()]


def descriptors():
    gc.collect()  # what other tests have left to it has descriptors, too
    return len(list(Path("/proc/self/fd").iterdir()))


def allow_descriptors(more):
    """Let this process open so many `more`. The limit is one for numbers: there may be gaps between those that are used."""
    gc.collect()
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = (number for number in itertools.count() if number not in used)
    last = next(itertools.islice(free, more - 1, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def check(shard_set, samples):
    got = shard_set.gather(samples)
    assert list(got) == ["image", "label"]
    np.testing.assert_array_equal(got["image"], IMAGES[samples])
    np.testing.assert_array_equal(got["label"], LABELS[samples])
    assert got["image"].dtype == np.uint8
    assert got["label"].dtype == np.int64


@pytest.fixture
def three(tmp_path):
    for i, (start, stop) in enumerate([(0, 40), (40, 41), (41, 100)]):
        write_shard(tmp_path / f"{i}.h5", fields(start, stop))
    return tmp_path


@pytest.fixture
def mixed(tmp_path):
    """Contiguous, empty, chunked with compression, compact, never written, and chunked without compression."""
    write_shard(tmp_path / "0.h5", fields(0, 30))
    write_shard(tmp_path / "1.h5", fields(0, 0))
    with h5py.File(tmp_path / "2.h5", "w") as file:
        chunked = {"chunks": (8, 5, 2), "compression": "gzip", "shuffle": True}
        file.create_dataset("image", data=IMAGES[30:77], **chunked)
        file.create_dataset("label", data=LABELS[30:77], chunks=(16,))
    with h5py.File(tmp_path / "3.h5", "w") as file:
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space, kind = h5py.h5s.create_simple((23,)), h5py.h5t.NATIVE_INT64
        h5py.Dataset(h5py.h5d.create(file.id, b"label", kind, space, compact))[:] = LABELS[77:]
        file.create_dataset("image", data=IMAGES[77:], chunks=(7, 5, 3))
    return tmp_path


def test_any_order_with_repeats(three):
    with open_shards(three) as opened:
        assert len(opened) == 100
        assert opened.fields == {"image": Field((5, 3), np.dtype("u1")), "label": Field((), np.dtype("i8"))}
        assert opened.chunk_samples is None
        assert [file.samples for file in opened.files] == [40, 1, 59]
        for samples in (
            np.arange(100),
            np.arange(100)[::-1],
            RNG.integers(0, 100, 500),
            np.array([40]),
            np.array([3, 3]),
        ):
            check(opened, samples)
        assert opened.gather([])["image"].shape == (0, 5, 3)


def test_mixed_layouts_read_as_one(mixed):
    with open_shards(mixed) as opened:
        assert len(opened) == 100
        assert opened.chunk_samples == 16
        assert opened.files[2].layouts["image"].compression == "shuffle+deflate"
        assert opened.files[0].layouts["image"].offset is not None
        assert opened.files[3].layouts["label"].offset is None
        for samples in (np.arange(100), RNG.permutation(100), RNG.integers(0, 100, 500), np.array([99, 29, 30, 77])):
            check(opened, samples)


def test_out_is_filled_in_place(mixed):
    out = {"image": np.zeros((50, 5, 3), np.uint8), "label": np.zeros(50, np.int64)}
    with open_shards(mixed) as opened:
        got = opened.gather(np.array([99, 0, 50]), out)
        assert got["label"].base is out["label"]
        np.testing.assert_array_equal(out["label"][:4], [99, 0, 50, 0])
        np.testing.assert_array_equal(out["image"][:3], IMAGES[[99, 0, 50]])
        opened.gather(np.arange(20), out)  # of one contiguous file: goes straight into `out`
        np.testing.assert_array_equal(out["image"][:20], IMAGES[:20])
        with pytest.raises(ShardError, match=r"out\['image'\] must be an array uint8 \[51, 5, 3\] or longer"):
            opened.gather(np.arange(51), out)
        with pytest.raises(ShardError, match=r"out\['label'\] .* not nothing"):
            opened.gather([1], {"image": out["image"]})
        with pytest.raises(ShardError, match=r"out\['label'\] must be C-contiguous"):
            opened.gather([1], {**out, "label": out["label"][::2]})
        with pytest.raises(ShardError, match=r"out\['label'\] .* not int32 \[50\]"):
            opened.gather([1], {**out, "label": out["label"].astype("i4")})


@pytest.mark.parametrize("wrong", [-1, 100])
def test_sample_out_of_range(three, wrong):
    with open_shards(three) as opened, pytest.raises(ShardError, match=f"no sample {wrong} in this set of 100"):
        opened.gather([0, wrong])


def test_closed_set_is_not_read(three):
    with open_shards(three) as opened:
        check(opened, np.arange(3))
    with pytest.raises(ShardError, match="closed"):
        opened.gather([0])


def test_no_file_stays_open(mixed):
    before = descriptors()
    opened = open_shards(mixed)
    check(opened, np.arange(100))
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    assert descriptors() == before + 1 + 2 * 2  # a mapping, and two files with chunks, which are mapped as well
    opened.close()
    assert descriptors() == before


def test_more_files_than_a_process_may_map(tmp_path):
    for i in range(30):
        write_shard(tmp_path / f"{i}.h5", fields(i, i + 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_descriptors(20)
    try:
        with pytest.raises(ShardError, match="can't be mapped, Too many open files: pack fewer and larger shards"):
            open_shards(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(open_shards(tmp_path)) == 30


def test_more_chunked_files_than_a_process_may_open(tmp_path):
    for i in range(30):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            for name, array in fields(i, i + 1).items():
                file.create_dataset(name, data=array, chunks=array.shape)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_descriptors(20)
    try:
        with pytest.raises(ShardError, match=r"can't be opened, .*oo many .*pack fewer and larger shards"):
            open_shards(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    before = descriptors()
    with open_shards(tmp_path) as opened:
        assert len(opened) == 30
        assert descriptors() == before + 2 * 30  # however many fields a file has: itself, and its mapping
    assert descriptors() == before
    allow_descriptors(40)
    try:
        with open_shards(tmp_path) as opened:  # not mapped, since they are many for that
            assert descriptors() == before + 30
            assert sorted(opened.gather(np.arange(30))["label"].tolist()) == list(range(30))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_set_outlives_the_replacement_of_its_file(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, fields())
    with open_shards(path) as opened:
        write_shard(path, {"other": np.zeros(3)}, overwrite=True)
        check(opened, np.arange(100))


def reads_of(monkeypatch):
    """Return the chunks that are read from now on, as they are."""
    reads = []
    for kind in (chunked.Direct, chunked.ThroughHdf5):
        original = kind.read
        monkeypatch.setattr(
            kind, "read", lambda self, chunk, out, original=original: reads.append(chunk) or original(self, chunk, out)
        )
    return reads


def test_chunks_are_read_once_within_the_budget(mixed, monkeypatch):
    reads = reads_of(monkeypatch)
    samples = np.arange(30, 77)
    expected = 6 + 3  # chunks of image, of label
    for budget, times in ((1 << 20, 1), (1, 3)):
        with open_shards(mixed / "2.h5", cache_bytes=budget) as opened:
            reads.clear()
            for _ in range(3):
                np.testing.assert_array_equal(opened.gather(samples - 30)["image"], IMAGES[samples])
            assert len(reads) == times * expected


def test_chunk_used_last_is_kept_longest(tmp_path, monkeypatch):
    reads = reads_of(monkeypatch)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("label", data=LABELS, chunks=(10,))
    with open_shards(tmp_path, cache_bytes=160) as opened:  # two chunks
        for sample in (0, 10, 0, 20, 0, 20, 10):
            assert opened.gather([sample])["label"].tolist() == [sample]
        assert reads == [0, 1, 2, 1]


@pytest.mark.parametrize("dtype", [">f4", "<i2", "?", "c8", "S5", "f2", [("x", "f4"), ("y", ">i8")]])
@pytest.mark.parametrize("user_block", [0, 512])
def test_dtypes(tmp_path, dtype, user_block):
    array = np.zeros((6, 2), dtype)
    array.view(np.uint8)[:] = 1 if dtype == "?" else RNG.integers(1, 60, array.nbytes).reshape(6, -1)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=user_block) as file:
        file.create_dataset("byte", data=np.arange(6, dtype=np.uint8))  # so that the next one may lie unaligned
        file.create_dataset("value", data=array)
    with open_shards(tmp_path) as opened:
        assert opened.files[0].layouts["value"].offset >= user_block
        got = opened.gather([5, 0])["value"]
        assert got.dtype == array.dtype
        assert got.tobytes() == array[[5, 0]].tobytes()


def test_types_without_an_equal_in_numpy_are_converted(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = h5py.h5t.STD_I32LE.copy()
        kind.set_precision(20)
        kind.set_offset(4)
        data = h5py.Dataset(h5py.h5d.create(file.id, b"value", kind, h5py.h5s.create_simple((4,))))
        data[:] = np.array([1, -2, 3, 4], np.int32)
    with open_shards(tmp_path) as opened:
        np.testing.assert_array_equal(opened.gather([3, 1])["value"], [4, -2])


def test_ways_to_name_shards(three, monkeypatch):
    assert len(open_shards(three / "0.h5")) == 40
    assert len(open_shards(str(three / "*.h5"))) == 100
    assert len(open_shards(str(three / "[01].h5"))) == 41
    assert len(open_shards([three / "2.h5", str(three / "0.*")])) == 99
    monkeypatch.chdir(three)
    assert len(open_shards(".")) == 100
    assert len(open_shards("*.h5")) == 100
    odd = three / "a[1].h5"
    write_shard(odd, fields(0, 7))
    assert len(open_shards(odd)) == 7


def test_fingerprint(three, tmp_path):
    whole = open_shards(three).fingerprint
    assert whole == open_shards(str(three / "*.h5")).fingerprint
    assert whole != open_shards([three / "1.h5", three / "0.h5", three / "2.h5"]).fingerprint
    assert len(whole) == 64
    one = {}
    for name, arrays in {
        "a": {"x": np.zeros(3, "i4")},
        "b": {"y": np.zeros(3, "i4")},
        "c": {"x": np.zeros(3, "u4")},
        "d": {"x": np.zeros((3, 1), "i4")},
        "e": {"x": np.zeros(4, "i4")},
    }.items():
        path = tmp_path / "sub" / f"{name}.h5"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, arrays)
        one[name] = open_shards(path).fingerprint
    assert len(set(one.values())) == 5
    # What ranks with other versions of NumPy and h5py compare: it must stay as it is.
    assert one["a"] == "aeaf00b74a12adc398af53847952a0339984a6909dc70b23d7ded09656022710"


def test_type_with_remarks_of_h5py(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=np.array([b"ab", b"cd"], h5py.string_dtype("utf-8", 2)))
        file.create_dataset("enum", data=[0, 1], dtype=h5py.enum_dtype({"no": 0, "yes": 1}))
    with open_shards(tmp_path) as opened:
        assert len(opened.fingerprint) == 64
        assert opened.gather([1])["text"].tolist() == [b"cd"]
        assert opened.gather([1])["enum"].tolist() == [1]


def test_field_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Field((), np.dtype("u1")).shape = (1,)


def test_classes(tmp_path):
    write_shard(tmp_path / "a.h5", fields(), classes=["cat", "größer"])
    write_shard(tmp_path / "b.h5", fields(), classes=["cat", "dog"])
    assert open_shards(tmp_path / "a.h5").classes == ("cat", "größer")
    with pytest.raises(ShardError, match=r"b\.h5 has classes .*dog.*a\.h5"):
        open_shards(tmp_path)


# Each of these makes a bad file of the whole shard `path`, and gives what the error must say of it.
def remove(path):
    path.unlink()
    return "does not exist: correct the path"


def be_text(path):
    path.write_text("not a shard")
    return "is not an HDF5 file: convert it"


def be_empty(path):
    path.write_bytes(b"")
    return "is not an HDF5 file"


def lose_the_end(path):
    os.truncate(path, path.stat().st_size - 1)
    return "truncated or damaged, copy or pack it again: .*truncated"


def lose_the_end_unnoticed_by_hdf5(path):
    content = bytearray(path.read_bytes()[:-1])
    content[40:48] = len(content).to_bytes(8, "little")  # the end of the file as its superblock has it
    path.write_bytes(content)
    return "is truncated"  # newer versions of HDF5 see this as well


def scramble(path):
    content = bytearray(path.read_bytes())
    content[96:136] = b"\xff" * 40  # the root group's header
    path.write_bytes(content)
    return "truncated or damaged"


def rewrite(make):
    def damage(path):
        path.unlink()
        with h5py.File(path, "w") as file:
            return make(file)

    damage.__name__ = make.__name__
    return damage


@rewrite
def only_groups(file):
    file.create_group("weights").create_dataset("image", data=IMAGES)
    return "no data set in its root"


@rewrite
def unequal_lengths(file):
    file["image"], file["label"] = IMAGES, LABELS[1:]
    return "different numbers of samples, {'image': 100, 'label': 99}"


@rewrite
def single_value(file):
    file["image"], file["label"] = IMAGES, 3
    return "'label' is a single value"


@rewrite
def strings(file):
    file["image"], file["label"] = IMAGES, ["a"] * 100
    return "'label' has values of variable length"


@rewrite
def virtual(file):
    layout = h5py.VirtualLayout((100, 5, 3), "u1")
    layout[:] = h5py.VirtualSource("other.hdf5", "image", (100, 5, 3))
    file.create_virtual_dataset("image", layout)
    return "'image' has its data in other files"


@rewrite
def external_storage(file):
    file.create_dataset("image", (100, 5, 3), "u1", external=[(file.filename + ".raw", 0, 1500)])
    return "'image' has its data in other files"


@rewrite
def external_link(file):
    other = Path(file.filename).with_name("other.hdf5")
    write_shard(other, fields())
    file["image"] = h5py.ExternalLink(str(other), "image")
    return "'image' has its data in other files"


@rewrite
def unknown_filter(file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((10,))
    plist.set_filter(400, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(file.id, b"label", h5py.h5t.NATIVE_INT64, h5py.h5s.create_simple((100,)), plist)
    return "needs HDF5 filter 400"


@rewrite
def no_samples(file):
    file["image"] = IMAGES[:0]
    return "there is no sample in"


DAMAGES = [
    *(remove, be_text, be_empty, lose_the_end, lose_the_end_unnoticed_by_hdf5, scramble, only_groups, unequal_lengths),
    *(single_value, strings, virtual, external_storage, external_link, unknown_filter, no_samples),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_file(tmp_path, damage):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:  # the label first, so that the image's bytes come last
        file["label"], file["image"] = LABELS, IMAGES
    assert len(open_shards(path)) == 100
    says = damage(path)
    with pytest.raises(ShardError, match=says) as caught:
        open_shards(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (
            {"image": IMAGES, "label": LABELS.astype("i4")},
            r"'label' is Field\(shape=\(\), dtype=dtype\('int32'\)\) here",
        ),
        ({"image": IMAGES[:, :4], "label": LABELS}, r"'image' is Field\(shape=\(4, 3\).* here and .*shape=\(5, 3\)"),
        ({"image": IMAGES}, r"'label' is absent here"),
        ({"image": IMAGES, "label": LABELS, "weight": LABELS}, r"'weight' is .* here and absent there"),
    ],
)
def test_file_unlike_the_first(tmp_path, arrays, says):
    write_shard(tmp_path / "a.h5", fields())
    write_shard(tmp_path / "b.h5", arrays)
    with pytest.raises(ShardError, match=rf"b\.h5 does not match .*a\.h5: field {says}"):
        open_shards(tmp_path)


def test_nothing_found(tmp_path):
    for where in (tmp_path, str(tmp_path / "*.h5")):
        with pytest.raises(ShardError, match=r"there are no shards at .*hpc-elastic pack"):
            open_shards(where)
    with pytest.raises(ShardError, match="no shards were named"):
        open_shards([])


def test_same_file_twice(three):
    with pytest.raises(ShardError, match=r"0\.h5 is named 2 times"):
        open_shards([three / "0.h5", three])


def test_missing_one_of_numbered_shards(tmp_path):
    for i in (0, 2):
        write_shard(tmp_path / f"shard-0000{i}-of-00003.h5", fields())
    with pytest.raises(ShardError, match="has 2 of the 00003 shards"):
        open_shards(tmp_path)
    assert len(open_shards(str(tmp_path / "*.h5"))) == 200  # asked for by a pattern: some may be what is wanted


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.h5", fields())
    (tmp_path / "a.h5").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # what is above this folder may not be searched by others
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)  # root may read anything
    try:
        for path in ("a.h5", tmp_path / "a.h5") if me == 0 else ("a.h5",):
            with pytest.raises(ShardError, match=r"a\.h5 may not be read by this user"):
                open_shards(path)
    finally:
        os.seteuid(me)


def test_file_damaged_after_opening(mixed):
    path = mixed / "2.h5"
    with open_shards(mixed) as opened:
        os.truncate(path, 3000)
        with pytest.raises(ShardError, match=r"2\.h5 is truncated or damaged"):
            opened.gather([40])
        check(opened, np.arange(30))  # the others are as they were


def test_write_keeps_what_is_there(tmp_path):
    path = tmp_path / "a.h5"
    write_shard(path, fields())
    with pytest.raises(ShardError, match="already there"):
        write_shard(path, fields(0, 3))
    assert len(open_shards(path)) == 100
    write_shard(path, fields(0, 3), overwrite=True)
    assert len(open_shards(path)) == 3
    assert names(tmp_path) == ["a.h5"]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "one or more fields"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, r"not \{'a': \[3\], 'b': \[4\]\}"),
        ({"a": np.float32(3)}, "one or more fields"),
        ({"a": np.array(["x", None])}, "'a' of object can't be stored"),
        ({"a": np.array(["x"])}, "'a' of <U1 can't be stored"),
        ({"a/b": np.zeros(3)}, "'a/b' .* can't be stored"),
    ],
)
def test_write_refuses(tmp_path, arrays, says):
    with pytest.raises(ShardError, match=says):
        write_shard(tmp_path / "a.h5", arrays)
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [100, 3000])
def test_full_disk_leaves_nothing(tmp_path, limit):
    kept = tmp_path / "kept.h5"
    write_shard(kept, fields(0, 5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for path in (tmp_path / "a.h5", kept):
            with pytest.raises(ShardError, match=f"can't be written, {os.strerror(errno.EFBIG)}"):
                write_shard(path, {"image": np.zeros(100_000, np.uint8)}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == ["kept.h5"]
    assert len(open_shards(kept)) == 5


def test_no_such_folder(tmp_path):
    with pytest.raises(ShardError, match="can't be written, No such file or directory"):
        write_shard(tmp_path / "none" / "a.h5", fields())
