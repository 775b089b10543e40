"""Chunks: read past HDF5 as HDF5 reads them, kept within the budget, shared by processes that come, go and die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import uuid
import zlib
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.errors import ShardError
from hpc_elastic.places import shared_files, shared_memory
from hpc_elastic.shards import chunked, kept, open_shards
from hpc_elastic.shards.files import described
from hpc_elastic.shards.kept import Recent, Shared

RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def memory(tmp_path_factory, monkeypatch):
    """A folder instead of /dev/shm: tests that run side by side would see, and remove, each other's files."""
    folder = tmp_path_factory.mktemp("memory")
    monkeypatch.setattr("hpc_elastic.places.SHARED_MEMORY", folder)
    monkeypatch.setattr("hpc_elastic.shards.dataset.SHARED_MEMORY", folder)
    yield folder
    assert not list(folder.iterdir())


COMPRESSIONS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle": {"shuffle": True},
    "shuffle+gzip": {"shuffle": True, "compression": "gzip"},
    "zstd": dict(hdf5plugin.Zstd()),
    "shuffle+zstd": {"shuffle": True, **hdf5plugin.Zstd()},
}
OTHERS = {
    "lzf": {"compression": "lzf"},
    "gzip+fletcher32": {"compression": "gzip", "fletcher32": True},
    "blosc": dict(hdf5plugin.Blosc()),
}
DTYPES = ["u1", "<i2", ">i4", "<f4", ">f8", "?", "S3", "c8", [("x", "<f4"), ("y", ">i2")]]


def values(dtype, n, shape):
    """Return an array that can be compressed."""
    array = np.zeros((n, *shape), dtype)
    if array.nbytes:
        array.view(np.uint8)[...] = RNG.integers(0, 2, array.view(np.uint8).shape)
    return array


@given(
    filters=st.sampled_from([*COMPRESSIONS, *OTHERS]),
    user_block=st.sampled_from([0, 512]),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 40),
    length=st.integers(1, 40),
    shape=st.sampled_from([(), (3,), (2, 5)]),
    kernel=st.sampled_from(["new", "old"]),
)
def test_chunks_are_read_as_hdf5_reads_them(tmp_path_factory, filters, user_block, dtype, n, length, shape, kernel):
    path = tmp_path_factory.mktemp("chunks") / "a.h5"
    array = values(dtype, n, shape)
    with h5py.File(path, "w", userblock_size=user_block) as file:
        how = {**COMPRESSIONS, **OTHERS}[filters]
        file.create_dataset("value", data=array, chunks=(min(n, length), *shape), **how)
    with pytest.MonkeyPatch.context() as patch, open_shards(path, cache_bytes=1) as opened:
        if kernel == "old":
            patch.setattr(chunked, "MADV_POPULATE_READ", 9999)
        for _ in range(2):
            order = RNG.permutation(n)
            assert opened.gather(order)["value"].tobytes() == array[order].tobytes()
    direct = isinstance(chunked.chunks_of(described(path), "value", chunked.Opened(path)), chunked.Direct)
    assert direct == (filters in COMPRESSIONS)


def test_chunks_that_were_never_written_or_not_compressed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("value", (40,), "i4", chunks=(10,), fillvalue=7, compression="gzip")
        data[10:20] = np.arange(10)
        data.id.write_direct_chunk((20,), np.arange(10, 20, dtype="i4").tobytes(), filter_mask=1)
    with open_shards(tmp_path) as opened:
        expected = np.array([*[7] * 10, *range(20), *[7] * 10])
        np.testing.assert_array_equal(opened.gather(np.arange(40))["value"], expected)


def test_types_that_h5py_marks(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("text", data=np.array([b"ab", b"cd"], h5py.string_dtype("utf-8", 2)), chunks=(1,))
        file.create_dataset("enum", data=[0, 1], dtype=h5py.enum_dtype({"no": 0, "yes": 1}), chunks=(2,))
    with open_shards(tmp_path) as opened:
        assert opened.gather([1, 0])["text"].tolist() == [b"cd", b"ab"]
        assert opened.gather([1, 0])["enum"].tolist() == [1, 0]


CODECS = {"gzip": zlib.compress, "zstd": zstandard.compress, "shuffle+zstd": zstandard.compress}


@pytest.mark.parametrize("compression", ["none", *CODECS])
@pytest.mark.parametrize("damage", ["scrambled", "cut off", "too long"])
def test_damaged_chunk(tmp_path, compression, damage):
    if compression == "none" and damage != "cut off":
        pytest.skip("nothing tells that it is damaged")
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("value", data=values("u1", 400, ()), chunks=(100,), **COMPRESSIONS[compression])
        if damage == "too long":
            data.id.write_direct_chunk((200,), CODECS[compression](bytes(500)))
        place = data.id.get_chunk_info(2)
    with open_shards(path) as opened:
        content = bytearray(path.read_bytes())
        if damage == "cut off":
            os.truncate(path, place.byte_offset + place.size // 2)
        elif damage == "scrambled":
            content[place.byte_offset : place.byte_offset + place.size] = b"\xee" * place.size
            path.write_bytes(content)
        with pytest.raises(ShardError, match=r"a\.h5 is truncated or damaged.*chunk 2 of 'value'"):
            opened.gather([250])
        assert opened.gather([1])["value"].shape == (1,)


@pytest.mark.parametrize("to_nothing", [True, False])
def test_file_that_becomes_shorter_while_it_is_mapped(tmp_path, to_nothing):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("value", data=values("u1", 40_000, ()), chunks=(10_000,), **COMPRESSIONS["zstd"])
        place = data.id.get_chunk_info(2)
    with open_shards(path, cache_bytes=1) as opened:
        for sample in (25_000, 1):  # the second pushes the first one out
            opened.gather([sample])
        os.truncate(path, 0 if to_nothing else place.byte_offset + place.size // 2)
        with pytest.raises(ShardError, match=r"a\.h5 is truncated or damaged.*chunk 2 of 'value'"):
            opened.gather([25_000])
        if not to_nothing:
            assert opened.gather([1])["value"].shape == (1,)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3),
    slots=st.integers(1, 12),
    batches=st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 30), st.booleans()), max_size=12),
)
def test_samples_are_right_whatever_is_kept(lengths, slots, batches):
    """Also after a chunk could not be read, which may have pushed others out."""

    class Part:
        def __init__(self, samples, length, first):
            self.length, self.count, self.first = length, -(-samples // length), first

        def read(self, chunk, out):
            out.view(np.int64)[:] = self.first + chunk * self.length + np.arange(self.length)
            if bad == (self.first, chunk):
                raise ShardError("damaged")

    firsts = np.cumsum([0, *(samples for samples, _ in lengths)])
    parts = [Part(*each, first) for each, first in zip(lengths, firsts[:-1].tolist(), strict=True)]
    store = kept.Store(parts, 8, slots * 8 * max(length for _, length in lengths))
    for seed, n, fails in batches:
        random = np.random.default_rng(seed)
        part = int(random.integers(len(parts)))
        wanted = random.integers(0, lengths[part][0], n)
        target = np.full(n, -1)
        bad = (parts[part].first, int(random.integers(parts[part].count))) if fails else None
        try:
            store.take(part, wanted, target.view(np.uint8).reshape(n, 8), None)
        except ShardError:
            assert fails
        else:
            assert target.tolist() == (firsts[part] + wanted).tolist()


@given(
    chunks=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True), max_size=30),
    slots=st.integers(4, 12),
)
def test_recent_chunks(chunks, slots):
    """Each is where it is said to be, and those used last have not been read again."""
    places, reads, used = Recent(12, slots, 3), [], []

    def read(chunk, memory):
        reads.append(chunk)
        memory[:] = chunk

    for wanted in chunks:
        reads.clear()
        places.fetch(np.array(wanted), read)
        assert (places.slots_of(np.array(wanted)) >= 0).all()
        found = places.slots_of(np.array(wanted))
        assert [places.memory[slot].tolist() for slot in found] == [[chunk] * 3 for chunk in wanted]
        assert len(set(found.tolist())) == len(wanted)
        kept_last = list(dict.fromkeys(reversed(used)))[:slots]
        assert not set(reads) & set(kept_last[: slots - len(wanted)])
        used += wanted


def test_chunk_that_can_not_be_read_is_not_kept():
    places = Recent(5, 2, 1)

    def fail(_, memory):
        memory[:] = 99
        raise ShardError("damaged")

    for chunk in (0, 1):
        places.fetch(np.array([chunk]), lambda chunk, memory: memory.fill(chunk))
    with pytest.raises(ShardError):
        places.fetch(np.array([2]), fail)
    for chunk in (2, 1, 0):
        places.fetch(np.array([chunk]), lambda chunk, memory: memory.fill(chunk))
        (slot,) = places.slots_of(np.array([chunk]))
        assert places.memory[slot] == chunk


# --- shared by processes ----------------------------------------------------------------------------------------------

COUNT, NBYTES = 200, 5000


@pytest.fixture
def path():
    found = shared_memory(f"test-{uuid.uuid4().hex[:8]}")
    yield found
    assert not found.exists()


def fill(chunk, memory):
    memory[:] = chunk % 251


def check(places, chunks):
    places.fetch(np.array(chunks), fill)
    assert places.slots_of(np.array(chunks)).tolist() == list(chunks)
    for chunk in chunks:
        assert (places.memory[chunk] == chunk % 251).all()


def fork(function):
    """Run `function` in a process of its own, which begins now."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def test_processes_share_what_they_read(path, monkeypatch):
    monkeypatch.setattr(kept, "WAIT_S", 30.0)  # one that the machine does not let run is read for by others after a while
    counted = multiprocessing.get_context("fork").Value("i", 0)

    def some():
        places = Shared(path, COUNT, NBYTES)

        def read(chunk, memory):
            with counted:
                counted.value += 1
            fill(chunk, memory)

        for start in range(0, COUNT, 40):
            chunks = np.arange(start, start + 40)
            places.fetch(chunks, read)
            assert (places.memory[chunks] == (chunks % 251)[:, None]).all()
        places.close()

    own = Shared(path, COUNT, NBYTES)
    others = [fork(some) for _ in range(3)]
    for other in others:
        other.join(30)
        assert other.exitcode == 0
    assert counted.value == COUNT  # each once
    check(own, range(COUNT))
    own.close()


def test_process_that_is_killed_as_it_reads(path):
    def dies():
        def read(_, memory):
            memory[:] = 255
            os.kill(os.getpid(), signal.SIGKILL)

        Shared(path, COUNT, NBYTES).fetch(np.array([3]), read)

    other = fork(dies)
    other.join(30)
    assert other.exitcode == -signal.SIGKILL
    assert path.exists()
    own = Shared(path, COUNT, NBYTES)
    check(own, [3, 4])
    own.close()


def test_process_that_stands_still_as_it_reads(path, monkeypatch):
    monkeypatch.setattr(kept, "WAIT_S", 0.05)
    own = Shared(path, COUNT, NBYTES)
    begun, goes_on = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def stands_still():
        def read(chunk, memory):
            begun.set()
            assert goes_on.wait(30)
            fill(chunk, memory)

        places = Shared(path, COUNT, NBYTES)
        places.fetch(np.array([3]), read)
        assert (places.memory[3] == 3).all()

    other = fork(stands_still)
    assert begun.wait(30)
    check(own, [2, 3, 4])  # it does not wait for the other one
    goes_on.set()
    other.join(30)
    assert other.exitcode == 0
    check(own, [3])
    own.close()


def test_the_last_one_removes_the_file(path):
    first, second = Shared(path, COUNT, NBYTES), Shared(path, COUNT, NBYTES)
    first.close()
    assert path.exists()
    check(second, [1])
    second.close()


def test_file_of_others_is_not_used(path):
    path.touch(0o644)
    path.chmod(0o644)
    try:
        with pytest.raises(PermissionError, match="not ours alone"):
            Shared(path, COUNT, NBYTES)
        path.unlink()
        path.symlink_to("/dev/null")
        with pytest.raises(OSError, match="symbolic links"):
            Shared(path, COUNT, NBYTES)
    finally:
        path.unlink()


def test_sets_share_if_the_budget_allows_it(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("value", data=np.arange(100), chunks=(8,), compression="gzip")
    key = uuid.uuid4().hex
    before = shared_now()
    for budget, shared in ((13 * 64, 1), (13 * 64 - 1, 0)):
        with open_shards(tmp_path, budget) as one, open_shards(tmp_path, budget) as other:
            for each in (one, other):
                each.share_chunks(key)
            new = shared_now() - before
            assert len(new) == shared
            assert all(path.stat().st_mode & 0o777 == 0o600 for path in new)
            for each in (one, other):
                assert each.gather(np.arange(100))["value"].tolist() == list(range(100))
        assert shared_now() == before


def compressed(path, values):
    with h5py.File(path, "w") as file:
        file.create_dataset("value", data=values, chunks=(8,), compression="gzip")


def shared_now():
    return set(shared_files())


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    compressed(tmp_path / "a.h5", np.arange(100))
    key, before = uuid.uuid4().hex, shared_now()

    def dies():
        opened = open_shards(tmp_path)
        opened.share_chunks(key)
        opened.gather([1])
        os.kill(os.getpid(), signal.SIGKILL)

    fork(dies).join(30)
    assert len(shared_now() - before) == 1
    with open_shards(tmp_path) as opened, open_shards(tmp_path) as other:
        opened.share_chunks("another key")
        other.share_chunks("another key")
        assert len(shared_now() - before) == 1
    assert shared_now() == before


def test_a_file_that_was_replaced_is_not_taken_for_the_one_before(tmp_path):
    key, before = uuid.uuid4().hex, shared_now()
    compressed(tmp_path / "a.h5", np.arange(100))
    old = open_shards(tmp_path)
    old.share_chunks(key)
    assert old.gather([7])["value"] == 7
    compressed(tmp_path / "b.h5", np.arange(100) + 1)
    (tmp_path / "b.h5").replace(tmp_path / "a.h5")
    with open_shards(tmp_path) as new:
        new.share_chunks(key)
        assert new.gather([7])["value"] == 8
        assert old.gather([90])["value"] == 90
    old.close()
    assert shared_now() == before


def test_file_of_another_length_is_not_used(path):
    first = Shared(path, COUNT, NBYTES)
    with pytest.raises(FileExistsError, match="another length"):
        Shared(path, COUNT, NBYTES + 1)
    check(first, [3])
    first.close()


def test_without_room_each_keeps_its_own(tmp_path, monkeypatch):
    compressed(tmp_path / "a.h5", np.arange(100))
    key, before = uuid.uuid4().hex, shared_now()
    monkeypatch.setattr(kept.os, "posix_fallocate", lambda *_: os.pread(-1, 1, 0))  # fails
    with open_shards(tmp_path) as opened:
        opened.share_chunks(key)
        assert opened.gather(np.arange(100))["value"].tolist() == list(range(100))
        assert shared_now() == before


def test_no_shared_memory_at_all(tmp_path, monkeypatch):
    compressed(tmp_path / "a.h5", np.arange(100))
    monkeypatch.setattr("hpc_elastic.places.SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr("hpc_elastic.shards.dataset.SHARED_MEMORY", tmp_path / "none")
    with open_shards(tmp_path / "a.h5") as opened:
        opened.share_chunks("key")
        assert opened.gather([99])["value"] == 99


def test_closed_while_it_is_read(tmp_path):
    compressed(tmp_path / "a.h5", np.arange(100))
    opened = open_shards(tmp_path)
    opened.share_chunks(uuid.uuid4().hex)
    (source,) = opened._sources[0]
    opened.close()
    with pytest.raises(ShardError, match="closed while they were read"):
        source.take(np.array([3]), np.empty((1, 8), np.uint8), None)


def test_blocks_of_contiguous_data(tmp_path):
    from hpc_elastic.shards import write_shard

    write_shard(Path(tmp_path / "a.h5"), {"value": np.arange(10_000)})
    with pytest.raises(ShardError, match="block_samples = 0 must be a whole number"):
        open_shards(tmp_path, block_samples=0)
    with open_shards(tmp_path, block_samples=700) as opened:
        assert opened.chunk_samples == 700
        for _ in range(2):
            order = RNG.permutation(10_000)
            np.testing.assert_array_equal(opened.gather(order)["value"], order)


def test_fields_without_bytes(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("none", data=np.zeros((100, 0), "f4"))
        file.create_dataset("value", data=np.arange(100), chunks=(8,))
    with open_shards(tmp_path) as opened:
        found = opened.gather([5, 3])
        assert found["none"].shape == (2, 0)
        assert found["value"].tolist() == [5, 3]


@pytest.mark.parametrize("how", [{}, {"chunks": (8,)}, {"chunks": (8,), "shuffle": True, "compression": "gzip"}])
def test_arrays_of_arrays(tmp_path, how):
    rows = np.arange(60, dtype="f4").reshape(20, 3)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("value", (20,), np.dtype(("f4", (3,))), **how)
        data[:] = rows
        file.create_dataset("empty", (20,), np.dtype(("f4", (2,))), **how)
    with open_shards(tmp_path) as opened:
        assert opened.fields["value"].shape == (3,)
        out = {"value": np.empty((4, 3), "f4"), "empty": np.empty((4, 2), "f4")}
        np.testing.assert_array_equal(opened.gather([7, 19], out)["value"], rows[[7, 19]])
        assert not opened.gather([7])["empty"].any()


def test_last_chunk_may_be_without_filters(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("value", data=np.arange(100), chunks=(8,), compression="gzip")
        file["value"].id.write_direct_chunk((96,), np.arange(96, 104).tobytes(), filter_mask=0)
    with open_shards(tmp_path) as opened:
        with pytest.raises(ShardError, match="truncated or damaged"):  # HDF5 does not think so either
            opened.gather([97])
        assert opened.gather([95])["value"] == 95


def test_order_belongs_to_the_fingerprint(tmp_path):
    compressed(tmp_path / "a.h5", np.arange(100))
    with open_shards(tmp_path) as eight, open_shards(tmp_path, block_samples=50) as fifty:
        assert eight.fingerprint != fifty.fingerprint


@pytest.mark.parametrize("given", [16.0, "16", 0])
def test_block_samples_are_whole(tmp_path, given):
    with pytest.raises(ShardError, match="must be a whole number, at least 1"):
        open_shards(tmp_path, block_samples=given)


def test_forked_process_reads_though_a_thread_was_reading(tmp_path, path):
    compressed(tmp_path / "a.h5", np.arange(100))
    shared = Shared(path, COUNT, NBYTES)
    check(shared, [1])
    with open_shards(tmp_path) as opened:
        (store,) = opened._stores.values()

        def reads():
            assert opened.gather([42])["value"] == 42
            shared.close()

        with store._lock:
            other = fork(reads)
        other.join(20)
        assert other.exitcode == 0
    assert path.exists()  # the parent's still
    check(shared, [1, 2])
    shared.close()


def test_files_that_go_through_hdf5_may_be_renamed(tmp_path, monkeypatch):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("value", data=np.arange(100), chunks=(8,), compression="lzf")
    monkeypatch.chdir(tmp_path)
    with open_shards("a.h5") as opened:
        monkeypatch.chdir("/")
        assert opened.gather([99])["value"] == 99
        (tmp_path / "a.h5").unlink()
        assert opened.gather([3])["value"] == 3
