"""Checkpoints: what is read is what was written, whatever the ranks; damage is told, and the one before is used."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from hpc_elastic import faults
from hpc_elastic.checkpoint import About, Buffers, Checkpoint, Rows, Store, Writer, files, manifest
from hpc_elastic.errors import CheckpointError
from hpc_elastic.model import Cursor
from tests.launch import ROOT

LIMIT_S = 20
quick = settings(deadline=None, max_examples=40)
GRID = np.arange(60, dtype=np.float32).reshape(20, 3)
DTYPES = ("<f8", ">f8", "f2", "?", "i1", ">u8", "c8", ">c16", "g", "S5", "U3", ">U3", "M8[us]", ">m8[s]", "V7", "S0", "U0")


def about(step=100, **others):
    standard = {"loop": 0, "names": ("w",), "settings": {"seed": 1}, "generation": 3, "time": 5.0}
    return About(**{**standard, "cursor": Cursor(1, 2, step), **others})


def weights(step=0):
    return [np.arange(1000, dtype=np.float64) + step, np.array([step, 1], dtype=">i8")]


def rows(array, start, stop, name="u"):
    return Rows(name, array.shape, array.dtype.str, start, array[start:stop])


def save(store, step=100, *, parts=2, arrays=None, grid=GRID, **others):
    """Write a checkpoint in several parts and return its folder."""
    of = about(step, **others)
    cuts = [len(grid) * i // parts for i in range(parts + 1)]
    for part, (start, stop) in enumerate(pairwise(cuts)):
        state = (b"head", weights(step) if arrays is None else arrays) if part == 0 else (b"", [])
        store.write_part(of, part, *state, [rows(grid, start, stop)])
    return store.commit(of, range(parts))


def same(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def check(checkpoint, step):
    """See that it is the one that `save` made at `step`, and good."""
    assert checkpoint.about == about(step)
    assert checkpoint.problems() == []
    assert checkpoint.header == b"head"
    for read, written in zip(checkpoint.arrays(), weights(step), strict=True):
        same(read, written)
    same(checkpoint.rows("u", 0, 20), GRID)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "checkpoints")


# --- what is written is read ------------------------------------------------------------------------------------------


ANY_ARRAY = arrays_of.arrays(
    dtype=st.one_of(arrays_of.scalar_dtypes(), arrays_of.byte_string_dtypes(), arrays_of.unicode_string_dtypes()),
    shape=arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@quick
@given(header=st.binary(max_size=50), arrays=st.lists(ANY_ARRAY, max_size=4), turned=st.booleans())
def test_round_trip(header, arrays, turned):
    arrays = [array.T[..., ::-1] if turned and array.ndim else array for array in arrays]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.write_part(about(), 0, header, arrays, [])
        store.commit(about(), [0])
        read = store.newest()
        assert read.header == header
        for one, other in zip(read.arrays(), arrays, strict=True):
            same(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_read_by_hdf5_as_well(store, dtype):
    """Numbers as they are, texts as code points, times as integers."""
    array = np.frombuffer(b"\1\0\0\0" * 96, dtype=np.uint8)[: 6 * np.dtype(dtype).itemsize]
    array = array.view(dtype).reshape(2, 3) if np.dtype(dtype).itemsize else np.ndarray((2, 3), dtype)
    arrays = [array, array[:1, :1].reshape(()), array[:0]]
    path = save(store, arrays=arrays)
    for one, other in zip(store.newest().arrays(), arrays, strict=True):
        same(one, other)
    with h5py.File(path / "part-0.h5") as file:
        found = file["state/0000"]
        assert found.attrs["dtype"] == array.dtype.str
        assert found[()].tobytes() == array.tobytes()
        assert found.shape[:2] == (2, 3)
        if array.dtype.kind in "biufcSV" and array.dtype.itemsize:
            assert found.dtype == array.dtype
        assert file["state/0001"].shape == found.shape[2:]
        assert file["state/0002"].shape[0] == 0


def test_hdf5_layout(store):
    path = save(store)
    assert names(path) == ["manifest.json", "part-0.h5", "part-1.h5"]
    with h5py.File(path / "part-1.h5") as file:
        assert file["header"].size == 0
        assert file["rows/u"].attrs["start"] == 10
        assert file["rows/u"].attrs["shape"].tolist() == [20, 3]
        np.testing.assert_array_equal(file["rows/u"], GRID[10:])
    with h5py.File(path / "part-0.h5") as file:
        assert file["header"][()].tobytes() == b"head"


@pytest.mark.parametrize("name", ["a/b", ".", "..", "äß", "a b", "/"])
def test_any_name(store, name):
    of = about()
    store.write_part(of, 0, b"", [], [rows(GRID, 0, 20, name), rows(GRID[:5], 0, 5, "a")])
    path = store.commit(of, [0])
    same(store.newest().rows(name, 3, 7), GRID[3:7])
    with h5py.File(path / "part-0.h5") as file:
        assert len(file["rows"]) == 2


def test_thousand_arrays(store):
    arrays = [np.full(i % 7, i) for i in range(1000)]
    path = save(store, arrays=arrays)
    for one, other in zip(store.newest().arrays(), arrays, strict=True):
        same(one, other)
    with h5py.File(path / "part-0.h5") as file:
        assert len(file["state"]) == 1000


DEEP = [np.zeros((1,) * 33)] if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else []  # more axes than HDF5 has


@pytest.mark.parametrize("bad", [np.array([{}]), np.zeros(2, "i4,f4"), *DEEP])
def test_what_cannot_be_stored(store, bad):
    with pytest.raises(CheckpointError, match="can't be stored: use plain numbers"):
        store.write_part(about(), 0, b"", [bad], [])
    store.clean()
    assert names(store.folder) == []


def test_rows_must_fit(store):
    with pytest.raises(CheckpointError, match="not of 'u'"):
        store.write_part(about(), 0, b"", [], [Rows("u", (20, 3), "f8", 0, GRID)])


@st.composite
def splits(draw, n):
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return list(pairwise([0, *cuts, n]))


@quick
@given(
    data=st.data(),
    n=st.integers(0, 40),
    row=st.sampled_from([(), (3,), (2, 0), (5, 2)]),
    piece=st.sampled_from([13, 100, 1000]),
)
def test_any_split_is_read_by_any_other(data, n, row, piece):
    array = np.random.default_rng(n).integers(0, 256, (n, *row)).astype(">i2")
    written, read = data.draw(splits(n)), data.draw(splits(n))
    state = data.draw(st.integers(0, len(written) - 1))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", piece)
        store, of = Store(Path(folder)), about()
        for part, (start, stop) in enumerate(written):
            store.write_part(
                of, part, b"head" if part == state else b"", [array] * (part == state), [rows(array, start, stop)]
            )
        store.commit(of, range(len(written)))
        checkpoint = store.newest()
        assert checkpoint.forms() == {"u": (array.shape, array.dtype)}
        assert checkpoint.header == b"head"
        same(checkpoint.arrays()[0], array)
        for start, stop in read:
            same(checkpoint.rows("u", start, stop), array[start:stop])


@pytest.mark.parametrize(("name", "start", "stop"), [("v", 0, 1), ("u", 0, 21), ("u", -1, 3), ("u", 5, 4)])
def test_rows_that_are_not_there(store, name, start, stop):
    checkpoint = Checkpoint.open(save(store))
    with pytest.raises(CheckpointError, match=r"has no rows .*it has 'u' \[20, 3\]"):
        checkpoint.rows(name, start, stop)


def test_about_survives_with_what_json_lacks(store):
    notes = {"tally": {"loss": math.inf, "n": 0.1, "big": 2**63}, "asked": None, "text": "ä"}
    save(store, notes={**notes, "nan": math.nan})
    found = store.newest().about
    assert math.isnan(found.notes.pop("nan"))
    assert found == about(notes=notes)
    assert found.name == "00-000000100"


def test_only_for_the_owner(store):
    path = save(store)
    assert {p.stat().st_mode & 0o777 for p in (store.folder, path)} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o600}


def test_hdf5_is_imported_only_to_write():
    code = "import sys, hpc_elastic.checkpoint; sys.exit('h5py' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S, cwd=ROOT)


# --- which there are --------------------------------------------------------------------------------------------------


def test_nothing_there(store):
    assert store.all() == []
    assert store.newest() is None
    store.clean()


def test_keep(store):
    for step in range(100, 700, 100):
        save(store, step)
    assert [path.name for path in store.all()] == ["00-000000400", "00-000000500", "00-000000600"]
    assert names(store.folder) == [path.name for path in store.all()]
    save(store, 200)  # the job was begun anew from an old one: what it makes now is not thrown away
    assert [path.name for path in store.all()] == ["00-000000200", "00-000000500", "00-000000600"]


def test_half_removed_ones_do_not_count(store, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
    for step in range(100, 600, 100):
        save(store, step)
    assert [path.name for path in store.all()] == ["00-000000300", "00-000000400", "00-000000500"]


def test_order_is_by_loop_and_step(store):
    store = Store(store.folder, keep=9)
    for loop, step in [(0, 10**10), (1, 5), (0, 7), (101, 2), (99, 3)]:
        save(store, step, loop=loop)
    places = []
    while found := store.newest():
        places.append(found.about.place)
        shutil.rmtree(found.path)
    assert places == [(101, 2), (99, 3), (1, 5), (0, 10**10), (0, 7)]


def test_only_newer_ones(store):
    """Where the newest is damaged, the one before it is, too, or none."""
    save(store, 100)
    last = save(store, 200)
    assert store.newest((0, 200)) is None
    check(store.newest((0, 199)), 200)
    assert store.newest((1, 0)) is None
    (last / "part-1.h5").unlink()
    assert store.newest((0, 150)) is None
    check(store.newest((0, 50)), 100)


def test_manifest_counts_more_than_name(store):
    old = save(store, 100)
    save(store, 200)
    old.rename(store.folder / "00-000000300")
    check(store.newest(), 200)


def test_one_that_is_there_stays(store):
    path = save(store)
    before = (path / "manifest.json").stat().st_ino
    assert save(store, parts=3) == path
    assert (path / "manifest.json").stat().st_ino == before
    assert names(store.folder) == [path.name]


def test_damaged_one_is_replaced(store):
    path = save(store)
    (path / "part-1.h5").unlink()
    save(store, parts=3)
    check(store.newest(), 100)
    assert names(store.folder) == [path.name, path.name + ".damaged"]
    for step in (200, 300, 400):
        save(store, step)
    assert not any(name.endswith("damaged") for name in names(store.folder))


def test_one_of_another_job_is_replaced(store):
    save(store, settings={"seed": 2})
    save(store)
    check(store.newest(), 100)


def test_parts_must_be_ready(store):
    of = about()
    assert not store.ready(of, [0])
    store.write_part(of, 0, b"", [], [rows(GRID, 0, 10)])
    assert store.ready(of, [0])
    assert not store.ready(of, [0, 1])
    with pytest.raises(CheckpointError, match="part 1 is not ready"):
        store.commit(of, [0, 1])
    with pytest.raises(CheckpointError, match="row 10 of 'u' is in no part"):
        store.commit(of, [0])


def test_leftovers_of_other_members_do_not_count(store):
    store.write_part(about(), 0, b"head", weights(100), [rows(GRID, 0, 5)])
    store.write_part(about(), 1, b"", [], [rows(GRID, 5, 20)])
    store.write_part(about(), 2, b"", [], [])
    now = about(generation=4)
    store.write_part(now, 0, b"head", weights(100), [rows(GRID, 0, 10)])
    assert not store.ready(now, [0, 1])
    store.write_part(now, 1, b"", [], [rows(GRID, 10, 20)])
    path = store.commit(now, [0, 1])
    assert names(path) == ["manifest.json", "part-0.h5", "part-1.h5"]
    assert store.newest().problems() == []


def test_unfinished_ones_go(store):
    for step in (100, 300):
        store.write_part(about(step), 0, b"", [], [])
    save(store, 200)
    assert names(store.folder) == [".00-000000300.unfinished", "00-000000200"]
    store.clean()
    assert names(store.folder) == ["00-000000200"]
    check(store.newest(), 200)


def test_two_states(store):
    for part in (0, 1):
        store.write_part(about(), part, b"head", [], [])
    with pytest.raises(CheckpointError, match="more than one part has a state"):
        store.commit(about(), [0, 1])


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(store):
    """Give a store with two checkpoints, and the folder of the newer; the older is used when that is damaged."""
    told = []
    store = Store(store.folder, on_damage=lambda path, problem: told.append((path, problem)))
    save(store, 100)
    path = save(store, 200)
    yield store, path
    check(store.newest(), 100)
    ((where, problem),) = told
    assert where == path
    assert str(path) in problem
    assert names(store.folder) == ["00-000000100", "00-000000200.damaged"]


def flip(path, at, by=1):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ by]))


def each_file(path):
    return [path / name for name in ("manifest.json", "part-0.h5", "part-1.h5")]


def test_any_flipped_byte_is_found(store):
    path, dice = save(store, parts=2), random.Random(0)
    for file in each_file(path):
        for _ in range(100):
            at, by = dice.randrange(file.stat().st_size), dice.randrange(1, 256)
            flip(file, at, by)
            with pytest.raises(CheckpointError, match=file.name):  # noqa: PT012
                problems = Checkpoint.open(path).problems()
                raise CheckpointError("".join(problems))
            flip(file, at, by)
    check(store.newest(), 100)


def test_any_truncation_is_found(store):
    path, dice = save(store), random.Random(0)
    for file in each_file(path):
        whole = file.read_bytes()
        for length in [0, len(whole) - 1, *(dice.randrange(len(whole)) for _ in range(30))]:
            os.truncate(file, length)
            with pytest.raises(CheckpointError, match=file.name):  # noqa: PT012
                problems = Checkpoint.open(path).problems()
                raise CheckpointError("".join(problems))
            file.write_bytes(whole)
    check(store.newest(), 100)


@pytest.mark.parametrize("name", ["manifest.json", "part-0.h5", "part-1.h5"])
@pytest.mark.parametrize("what", ["missing", "flipped", "truncated", "longer", "link", "pipe", "folder"])
def test_damage_is_passed_over(two, name, what):
    _, path = two
    file = path / name
    if what == "flipped":
        flip(file, file.stat().st_size // 2)
    elif what == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif what == "longer":
        with file.open("ab") as stream:
            stream.write(b"{")
    else:
        file.rename(path / "elsewhere")
        if what == "link":
            file.symlink_to(path / "elsewhere")
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "folder":
            file.mkdir()


def test_swapped_parts(two):
    _, path = two
    (path / "part-0.h5").rename(path / "x")
    (path / "part-1.h5").rename(path / "part-0.h5")
    (path / "x").rename(path / "part-1.h5")


def test_parts_of_another_one(two):
    store, path = two
    shutil.copy(store.folder / "00-000000100" / "part-0.h5", path / "part-0.h5")


def test_reading_tells_damage_by_itself(store):
    checkpoint = Checkpoint.open(save(store))
    for part in (0, 1):
        file = checkpoint.path / f"part-{part}.h5"
        os.truncate(file, file.stat().st_size - 1)
    for read in (lambda: checkpoint.header, checkpoint.arrays, lambda: checkpoint.rows("u", 12, 13)):
        with pytest.raises(CheckpointError, match=r"part-.\.h5 is damaged"):
            read()
    assert len(checkpoint.problems()) == 2


def test_all_are_damaged(store):
    for step in (100, 200):
        (save(store, step) / "manifest.json").write_bytes(b"\xff{")
    assert store.newest() is None
    assert names(store.folder) == ["00-000000100.damaged", "00-000000200.damaged"]
    save(store, 50)
    check(store.newest(), 50)


def test_damage_where_nothing_can_be_renamed(two, monkeypatch):
    store, path = two
    (path / "part-1.h5").unlink()

    def forbidden(*_):
        raise PermissionError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", forbidden)
        check(Store(store.folder).newest(), 100)


def test_what_this_process_cannot_read_is_not_given_up(store, monkeypatch):
    """Too many open files, say: all checkpoints would be set aside, and the job would begin at the beginning."""
    save(store, 100)
    real = os.open

    def full(path, *rest, **more):
        if str(path).endswith(".h5"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(CheckpointError, match="Too many open files"):
            store.newest()
    check(store.newest(), 100)


def test_open_says_what_to_do(store, tmp_path):
    path = save(store)
    with pytest.raises(CheckpointError, match=f"name one of them, the newest is {path}"):
        Checkpoint.open(store.folder)
    with pytest.raises(CheckpointError, match=r"name another one: .*missing"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="name another one"):
        Checkpoint.open(path / "manifest.json")


def rewritten(path, change):
    """Change the manifest in `path`, with a checksum that is right."""
    file = path / "manifest.json"
    whole = json.loads(file.read_bytes())
    change(whole)
    content = json.dumps(whole["content"]).encode()
    envelope = {"format": whole["format"], "sha256": hashlib.sha256(content).hexdigest(), "content": msgspec.Raw(content)}
    file.write_bytes(msgspec.json.encode(envelope))


def first_array(**changes):
    return lambda whole: whole["content"]["parts"][0]["arrays"][0].update(changes)


def first_rows(**changes):
    return lambda whole: whole["content"]["parts"][0]["rows"][0].update(changes)


def first_part(**changes):
    return lambda whole: whole["content"]["parts"][0].update(changes)


HOSTILE = {
    "version": lambda whole: whole.update(format=2),
    "no parts": lambda whole: whole["content"].update(parts=[]),
    "part twice": first_part(number=1),
    "negative part": first_part(number=-1),
    "part that leads out": first_part(number="../../x"),
    "notes": lambda whole: whole["content"].update(notes="gAI="),
    "pickled notes": lambda whole: whole["content"].update(notes="gAN9cQAu"),
    "objects": first_array(dtype="|O"),
    "dtype": first_array(dtype="no such"),
    "fields": first_array(dtype="i4,i4"),
    "huge dtype": first_array(dtype="V99999999999999999999"),
    "huge": first_array(shape=[10**18], nbytes=8 * 10**18),
    "too big": first_array(shape=[2000]),
    "wraps around": first_array(shape=[2**62, 4], nbytes=0),
    "axes": first_array(shape=[1000] + [1] * 80),
    "past the end": first_array(offset=10**6),
    "negative offset": first_array(offset=-8),
    "no digests": first_array(digests=[]),
    "rows past the end": first_rows(start=15),
    "rows of a value": first_rows(shape=[], total=[]),
    "other rows": first_rows(total=[20, 4]),
    "other dtype": first_rows(dtype="<i4"),
    "missing rows": first_rows(start=1),
    "no rows": first_part(rows=[]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_manifest(store, change):
    path = save(store)
    rewritten(path, lambda _: None)
    check(Checkpoint.open(path), 100)
    rewritten(path, change)
    with pytest.raises(CheckpointError, match=r"format 2, this version|is damaged|can't be right"):
        Checkpoint.open(path)


@quick
@given(text=st.text(max_size=12))
@pytest.mark.filterwarnings("ignore")
def test_any_text_for_a_dtype(text):
    span = {"offset": 0, "nbytes": 16, "digests": ("",), "dtype": text, "shape": (2,)}
    assert manifest.RowsSpan(**span, name="", start=0, total=(2,)).sound(16) in (True, False)


def test_zero_sizes_that_are_no_array(store):
    path = save(store, arrays=[np.empty((0, 3))])
    rewritten(path, first_array(shape=[0, 2**62, 2**62, 2**70]))
    with pytest.raises(CheckpointError):
        Checkpoint.open(path).arrays()


# --- failures of writing ----------------------------------------------------------------------------------------------


def disk_full(stage):
    def at(where):
        if where == stage:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return at


@pytest.mark.parametrize("stage", ["write", "manifest"])
def test_fault_points(store, stage, monkeypatch):
    save(store, 100)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "at", disk_full(stage))
        with pytest.raises(OSError, match="No space left"):
            save(store, 200)
    check(store.newest(), 100)
    assert not any(name.startswith(".") for name in names(store.folder / ".00-000000200.unfinished"))
    save(store, 300)
    assert names(store.folder) == ["00-000000100", "00-000000300"]


@pytest.fixture
def tiny(tmp_path):
    """Give a folder on a disk of 3 MiB."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True, timeout=LIMIT_S).returncode:
        pytest.skip("may not mount")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True, timeout=LIMIT_S)


@pytest.mark.parametrize("left", [0, 1, 4096, 9000, 300_000, 700_000, 1_000_000])
def test_full_disk(tiny, left):
    store, big = Store(tiny / "checkpoints", keep=2), np.zeros(1_000_000, np.uint8)
    save(store, 100, arrays=[big])
    ballast = tiny / "ballast"
    stat = os.statvfs(tiny)
    ballast.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - left)))
    writer = Writer(store)
    writer.write(about(200), 0, [0], b"head", [big], [rows(GRID, 0, 20)], commits=True)
    assert writer.wait(LIMIT_S)
    (outcome,) = writer.done()
    assert outcome.path is None
    assert "No space left on device: the disk is full: free space, or set checkpoint_dir" in outcome.error
    assert names(store.folder) == ["00-000000100"]
    assert store.newest().problems() == []
    with pytest.raises(OSError, match="No space left"):
        save(store, 300, arrays=[big])
    ballast.unlink()
    save(store, 400)
    check(store.newest(), 400)
    assert names(store.folder) == ["00-000000100", "00-000000400"]


def test_a_part_that_comes_too_late_takes_no_room(tiny):
    """Its checkpoint was given up by then; the next one needs the space."""
    store, big = Store(tiny / "checkpoints"), [np.zeros(1_200_000, np.uint8)]
    store.write_part(about(100), 1, b"", [], [rows(np.zeros((2, 2_000_000), np.uint8), 1, 2)])
    writer = Writer(store)
    writer.write(about(200), 0, [0], b"head", big, [], commits=True)
    assert writer.wait(LIMIT_S)
    assert [outcome.error for outcome in writer.done()] == [""]
    assert names(store.folder) == ["00-000000200"]


def test_no_thread_to_write(store, monkeypatch):
    """As when the user has as many as there may be: a whole checkpoint is written at once, of parts it is said."""
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    writer = Writer(store)
    writer.write(about(), 0, [0], b"head", weights(100), [rows(GRID, 0, 20)], commits=True)
    assert not writer.busy
    (outcome,) = writer.done()
    assert (outcome.path, outcome.error) == (store.folder / "00-000000100", "")
    check(store.newest(), 100)
    for part in (0, 1):
        writer.write(about(200), part, [0, 1], b"", [], [rows(GRID, 10 * part, 10 * part + 10)], commits=part == 0)
        (outcome,) = writer.done()
        assert "no more processes or threads can be had: raise the limit" in outcome.error
    assert store.given_up(about(200), [0, 1]) == outcome.error
    store.discard(about(200))
    assert names(store.folder) == ["00-000000100"]


def no_thread(_):
    raise RuntimeError("can't start new thread")


def test_lost_folder(store):
    save(store, 100)
    shutil.rmtree(store.folder)
    assert store.newest() is None
    save(store, 200)
    check(store.newest(), 200)


def test_folder_lost_while_written(store, monkeypatch):
    def lose(_stage):
        shutil.rmtree(store.folder)

    writer = Writer(store)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "at", lose)
        writer.write(about(), 0, [0], b"", weights(), [], commits=True)
        assert writer.wait(LIMIT_S)
    assert "the folder went away meanwhile" in writer.done()[0].error
    save(store, 200)
    check(store.newest(), 200)


KILLED = """
import os, random, select, signal, sys, time
from pathlib import Path
import numpy as np, h5py
from hpc_elastic.checkpoint import About, Rows, Store
from hpc_elastic.model import Cursor

folder, times = Path(sys.argv[1]), int(sys.argv[2])
dice = random.Random(0)

def about(step):
    return About(loop=0, cursor=Cursor(0, 0, step), names=(), settings={}, generation=0, time=0.0)

def train(step, told):
    store = Store(folder, keep=2)
    while True:
        step += 1
        values = np.full((2, 200_000), step)
        for part in (0, 1):
            rows = [Rows("u", values.shape, values.dtype.str, part, values[part : part + 1])]
            store.write_part(about(step), part, b"head" if part == 0 else b"", [values] if part == 0 else [], rows)
        store.commit(about(step), (0, 1))
        os.write(told, b"%12d" % step)

last, span_s = 0, None
for _ in range(times):
    listen, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        train(last, told)
    os.close(told)
    begun, data = time.monotonic(), b""
    if span_s is None:  # the first one has its time: so long three checkpoints take on this machine
        while len(data) < 36:
            data += os.read(listen, 36)
        span_s = time.monotonic() - begun
    else:
        time.sleep(dice.uniform(0, span_s))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(listen, "rb") as stream:
        data += stream.read()
    committed = int(data[-12:]) if data else last
    damaged = []
    found = Store(folder, on_damage=lambda *what: damaged.append(what)).newest()
    assert not damaged, damaged
    if found is None:
        assert committed == 0, committed
        continue
    last = found.about.cursor.step
    assert committed <= last <= committed + 1, (committed, last)
    assert (found.arrays()[0] == last).all() and (found.rows("u", 0, 2) == last).all()
print(last)
"""


def test_kill_at_any_moment(tmp_path):
    """Whenever a writing process is killed, the last checkpoint that it told of is there, or the one after."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "c"), "30"]
    done = subprocess.run(command, check=False, capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 0  # it did write
    store = Store(tmp_path / "c", keep=2)
    save(store, 10**6)
    assert len(names(store.folder)) == 2


# --- in the background ------------------------------------------------------------------------------------------------


def test_writers_of_two_processes(store):
    leader, other = Writer(store), Writer(store)
    assert leader.wait(0)
    assert leader.done() == []
    leader.write(about(), 0, range(2), b"head", weights(100), [rows(GRID, 0, 10)], commits=True)
    until(lambda: store.ready(about(), [0]))
    assert leader.busy
    with pytest.raises(CheckpointError, match="ask `busy` first"):
        leader.write(about(200), 0, range(2), b"", [], [], commits=True)
    assert not leader.wait(0.02)
    other.write(about(), 1, range(2), b"", [], [rows(GRID, 10, 20)], commits=False)
    assert other.wait(LIMIT_S)
    assert leader.wait(LIMIT_S)
    assert not leader.busy
    (first,), (second,) = leader.done(), other.done()
    assert (first.about, first.path, first.error) == (about(), store.folder / "00-000000100", "")
    assert (second.about, second.path, second.error) == (about(), None, "")
    assert first.bytes == 4 + 8000 + 16 + 120
    assert first.seconds > 0.02
    assert leader.done() == []
    check(store.newest(), 100)


@pytest.mark.parametrize("given_up", [True, False])
def test_parts_that_never_come(store, given_up):
    writer = Writer(store, limit_s=LIMIT_S if given_up else 0.02)
    writer.write(about(), 0, range(3), b"head", weights(100), [], commits=True)
    if given_up:
        until(lambda: store.ready(about(), [0]))
        writer.abandon()
    assert writer.wait(LIMIT_S / 2)
    (outcome,) = writer.done()
    assert outcome.path is None
    assert "parts 1, 2 are missing, " + ("it was given up" if given_up else "they did not come within") in outcome.error
    assert names(store.folder) == []
    writer.write(about(200), 0, [0], b"head", weights(200), [rows(GRID, 0, 20)], commits=True)
    assert writer.wait(LIMIT_S)
    check(store.newest(), 200)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system: change its permissions"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error: see to the file system"),
        (MemoryError("none"), "MemoryError: none"),
    ],
)
def test_nothing_is_raised_into_training(store, monkeypatch, error, text):
    def fail(_stage):
        raise error

    monkeypatch.setattr(faults, "at", fail)
    writer = Writer(store)
    writer.write(about(), 0, [0], b"", [], [], commits=True)
    assert writer.wait(LIMIT_S)
    assert text in writer.done()[0].error


class Counting:
    """A thread that does nothing but Python; `longest_s` is how long it stood still at most while others of the process ran.

    In seconds of the processor's time: what else the machine does counts for nothing.
    """

    def __enter__(self):
        self.longest_s, self._stop = 0.0, False
        self._thread = threading.Thread(target=self._count)
        self._thread.start()
        return self

    def _count(self):
        last = time.process_time()
        while not self._stop:
            now = time.process_time()
            self.longest_s = max(self.longest_s, now - last)
            last = now

    def __exit__(self, *_):
        self._stop = True
        self._thread.join()


def test_training_goes_on_while_100_mb_are_written(store):
    arrays = [np.random.default_rng(i).standard_normal(25 << 17) for i in range(4)]
    stalls, cpu = [], []
    for attempt in range(3):  # others use this machine as well
        begun = time.thread_time()
        store.write_part(about(attempt), 0, b"", arrays, [])
        cpu.append(time.thread_time() - begun)
        writer = Writer(store)
        with Counting() as counting:
            writer.write(about(attempt), 0, [0], b"", arrays, [], commits=True)
            assert writer.wait(LIMIT_S)
        assert writer.done()[0].path
        stalls.append(counting.longest_s)
        if stalls[-1] < 0.1 and cpu[-1] < 0.5:
            break
    assert min(stalls) < 0.1, stalls
    assert min(cpu) < 0.5, cpu


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_buffers_are_used_again():
    buffers = Buffers()
    arrays = [np.arange(6).reshape(2, 3).T, np.array(1.5), np.empty(0, "S3"), np.array(["a"])]
    first = buffers.copy(arrays)
    for one, other in zip(first, arrays, strict=True):
        assert one.flags.c_contiguous
        assert not np.shares_memory(one, other)
        same(one, other)
    changed = [arrays[0] + 1, np.array(2, ">i4"), arrays[2]]
    second = buffers.copy(changed)
    for one, other in zip(second, changed, strict=True):
        same(one, other)
    assert [one is other for one, other in zip(first, second, strict=False)] == [True, False, True]
    assert len(buffers.copy(arrays)) == 4


# --- parts that can't be written ------------------------------------------------------------------------------------------


def test_a_part_that_fails_is_not_waited_for(tmp_path):
    """Who commits is told, and says what went wrong on the other rank."""
    store = Store(tmp_path / "c")
    leads, other = Writer(store), Writer(store)
    leads.write(about(), 0, (0, 1), b"", [], [], commits=True)
    bad = np.array([object()], dtype=object)
    other.write(about(), 1, (0, 1), b"", [bad], [], commits=False)
    assert other.wait(LIMIT_S)
    assert leads.wait(LIMIT_S)
    (theirs,) = other.done()
    (ours,) = leads.done()
    assert theirs.error
    assert theirs.error in ours.error
    assert store.newest() is None
    assert not list((tmp_path / "c").iterdir())
