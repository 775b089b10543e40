"""Decompressed chunks, kept within a budget: those used last by this process, or all of them by the host's processes."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import ShardError
from .chunked import Chunks
from .rows import Bytes, Numbers, copy

WAIT_S = 0.25  # for a chunk that another process is about to read; then it is read twice
LOOK_S = 0.0005
NOWHERE = -(1 << 62)  # far below all samples' numbers

Read = Callable[[int, Bytes], None]


class NoRoomError(Exception):
    """The host has no memory for chunks that processes share."""


class Places(Protocol):
    """Where chunks are kept: `slots` places, of bytes [slots, nbytes of a chunk]."""

    slots: int
    memory: Bytes

    def use(self, chunks: Numbers) -> None:
        """Take note that `chunks`, which are there, are used now."""
        ...

    def fetch(self, chunks: Numbers, read: Read) -> Numbers:
        """Have `chunks` there, at most `slots` of them and each named once; return those that had to go."""
        ...

    def slots_of(self, chunks: Numbers) -> Numbers:
        """Return where `chunks` are, which are there."""
        ...

    def close(self) -> None: ...


class Store:
    """One field of all files that have it in chunks.

    Parameters
    ----------
    parts : sequence of Chunks
        Of each file.
    nbytes : int
        Bytes of a sample.
    budget_bytes : int
        What may be kept; one chunk at least is.
    """

    def __init__(self, parts: Sequence[Chunks], nbytes: int, budget_bytes: int) -> None:
        self._parts = parts
        self._nbytes = nbytes
        self._length = max(part.length for part in parts)
        self._firsts = np.cumsum([0, *(part.count for part in parts)]).tolist()
        self._begins = np.concatenate([part.length * np.arange(part.count) for part in parts])  # of each chunk, in its file
        self.count = len(self._begins)
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()  # one thread may read ahead while another one reads something else
        _stores.add(self)
        self._closed = False
        self._use(self._of_this_process())

    @property
    def _chunk_bytes(self) -> int:
        return self._length * self._nbytes

    @property
    def shape(self) -> tuple[int, int]:
        """How many chunks there are, and bytes of each."""
        return self.count, self._chunk_bytes

    def _of_this_process(self) -> Recent:
        slots = max(1, min(self.count, self._budget_bytes // self._chunk_bytes))
        return Recent(self.count, slots, self._chunk_bytes)

    def _use(self, places: Places) -> None:
        self._places = places
        self._rows = places.memory.reshape(-1, self._nbytes)
        self._shifts = np.full(self.count, NOWHERE)  # of each chunk: from samples' numbers to rows

    def share(self, path: Path) -> None:
        """Keep all chunks in the file `path`, in memory, with the other processes of this host.

        Raises
        ------
        OSError
            If the file can't be had, or is not what it should be. Then all stays as it was.
        """
        with self._lock:
            self._use(Shared(path, *self.shape))

    def unlock(self) -> None:
        """Be as before a read that another process was in."""
        if self._lock.locked():
            self._lock = threading.Lock()
            self._use(self._of_this_process())

    def close(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._closed = True
            self._places.close()
            self._rows = self._rows[:0].copy()

    def take(self, part: int, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """Copy the samples `wanted`, of which there are some, of a part to the rows `places` of `target`."""
        chunks = wanted // self._parts[part].length
        if part:
            chunks += self._firsts[part]
        with self._lock:
            if self._closed:
                raise ShardError("the shards were closed while they were read: open them again with open_shards")
            rows = self._shifts[chunks]
            rows += wanted
            if rows[rows.argmin()] >= 0:
                self._places.use(chunks)
                copy(self._rows, rows, target, places)
                return
            try:
                self._fetch_and_take(part, chunks, wanted, target, places)
            except NoRoomError:
                self._places.close()
                self._use(self._of_this_process())
                self._fetch_and_take(part, chunks, wanted, target, places)

    def _fetch_and_take(self, part: int, chunks: Numbers, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        needed = np.unique(chunks)
        if len(needed) <= self._places.slots:
            self._fetch(part, needed)
            copy(self._rows, self._shifts[chunks] + wanted, target, places)
            return
        for start in range(0, len(needed), self._places.slots):
            group = needed[start : start + self._places.slots]
            some = np.flatnonzero(np.isin(chunks, group))
            self._fetch(part, group)
            copy(self._rows, self._shifts[chunks[some]] + wanted[some], target, some if places is None else places[some])

    def _fetch(self, part: int, chunks: Numbers) -> None:
        reader, first = self._parts[part], self._firsts[part]
        nbytes = reader.length * self._nbytes
        try:
            gone = self._places.fetch(chunks, lambda chunk, memory: reader.read(chunk - first, memory[:nbytes]))
            self._shifts[gone] = NOWHERE
            self._shifts[chunks] = self._places.slots_of(chunks) * self._length - self._begins[chunks]
        except BaseException:
            self._shifts[:] = NOWHERE  # some may be gone
            raise


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _unlock() -> None:
    """Let a forked process read, though a thread of its parent was just reading."""
    for store in _stores:
        store.unlock()


os.register_at_fork(after_in_child=_unlock)


class Recent:
    """The chunks that this process used last."""

    def __init__(self, count: int, slots: int, nbytes: int) -> None:
        self.slots = slots
        self.memory: Bytes = np.empty((slots, nbytes), np.uint8)
        self._slot_of = np.full(count, -1)
        self._chunk_in = np.full(slots, -1)
        self._used = np.zeros(count, np.int64)  # when, in calls
        self._calls = 0

    def use(self, chunks: Numbers) -> None:
        self._calls += 1
        self._used[chunks] = self._calls

    def fetch(self, chunks: Numbers, read: Read) -> Numbers:
        self.use(chunks)
        missing = chunks[self._slot_of[chunks] < 0]
        empty = self._chunk_in < 0
        slots = np.argsort(np.where(empty, -1, self._used[self._chunk_in]), kind="stable")[: len(missing)]
        gone = self._chunk_in[slots[~empty[slots]]]  # those used longest ago
        self._slot_of[gone] = self._chunk_in[slots] = -1
        for chunk, slot in zip(missing.tolist(), slots.tolist(), strict=True):
            read(chunk, self.memory[slot])
        self._slot_of[missing], self._chunk_in[slots] = slots, missing
        return gone

    def slots_of(self, chunks: Numbers) -> Numbers:
        return self._slot_of[chunks]

    def close(self) -> None:
        self.slots, self.memory = 1, np.empty((1, 0), np.uint8)


class Shared:
    """All chunks, each at its place in a file in memory, which the processes of this host have in common.

    In front stands a byte for each chunk, 1 once it is there. A process that reads one locks this byte, so that others take
    others meanwhile. Nobody has to: a chunk that is read twice is written twice with the same bytes, which nobody notices.
    """

    def __init__(self, path: Path, count: int, nbytes: int) -> None:
        self.slots = count
        self._begin = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        self._nbytes = nbytes
        self._file = _open_own(path)
        self._close = weakref.finalize(self, _close, self._file, path, os.getpid())
        length = self._begin + count * nbytes
        if os.fstat(self._file).st_size not in (0, length):
            self._close()
            raise FileExistsError(f"{path} is of another length")
        os.ftruncate(self._file, length)
        whole = np.frombuffer(mmap.mmap(self._file, length), np.uint8)
        self.memory = whole[self._begin :].reshape(count, nbytes)
        self._seen = np.zeros(count, bool)

    def use(self, chunks: Numbers) -> None:
        """They all stay."""

    def missing(self, chunks: Numbers) -> Numbers:
        """Return those of `chunks` that are not there."""
        missing = chunks[~self._seen[chunks]]
        if len(missing):
            # By system calls, which no processor puts into another order: first the chunk, then the byte.
            there = np.frombuffer(os.pread(self._file, self.slots, 0), bool)
            self._seen[missing] = there[missing]
            missing = missing[~there[missing]]
        return missing

    def fetch(self, chunks: Numbers, read: Read) -> Numbers:
        missing = self.missing(chunks).tolist()
        # From different places on, so that processes that need the same chunks share the work.
        begin = os.getpid() % len(missing) if missing else 0
        missing = missing[begin:] + missing[:begin]
        for chunk in [chunk for chunk in missing if not self._claim(chunk, read)]:
            deadline = time.monotonic() + WAIT_S
            while len(self.missing(np.array([chunk]))):
                if time.monotonic() > deadline:
                    self._read(chunk, read)
                time.sleep(LOOK_S)
        return chunks[:0]

    def slots_of(self, chunks: Numbers) -> Numbers:
        return chunks

    def _claim(self, chunk: int, read: Read) -> bool:
        """Read a chunk; False if another process is reading it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk)
        except OSError:
            return False
        try:
            if len(self.missing(np.array([chunk]))):
                self._read(chunk, read)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, chunk)
        return True

    def _read(self, chunk: int, read: Read) -> None:
        beside = np.empty(self._nbytes, np.uint8)  # since decompressing writes a byte more than once
        read(chunk, beside)
        try:
            # What is not there when it is touched would end the process (SIGBUS).
            os.posix_fallocate(self._file, self._begin + chunk * self._nbytes, self._nbytes)
            self.memory[chunk] = beside
            os.pwrite(self._file, b"\1", chunk)
        except OSError as error:
            raise NoRoomError(error.strerror) from error
        self._seen[chunk] = True

    def close(self) -> None:
        self._close()
        self._file = -1  # the number may be another file's soon
        self.slots, self.memory = 1, np.empty((1, 0), np.uint8)


def _open_own(path: Path) -> int:
    """Open a file that is shared, or make it, and lock it as one that is in use.

    Raises
    ------
    OSError
        If that can't be done, or it is somebody else's.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        found = os.fstat(file)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
            os.close(file)
            raise PermissionError(f"{path} is not ours alone")
        fcntl.flock(file, fcntl.LOCK_SH)
        if _stands_at(file, path):
            return file
        os.close(file)  # the last one who used it removed it just now


def _stands_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _close(file: int, path: Path, opener: int) -> None:
    """Let go of a shared file; the last one to do so removes it. A forked process has its parent's lock, and lets it be."""
    with contextlib.suppress(OSError):
        if os.getpid() == opener:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _stands_at(file, path):
                path.unlink()
    os.close(file)


def remove_unused(paths: Iterable[Path]) -> None:
    """Remove those shared files of this user that no process uses: what used them was killed."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                _close(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), path, os.getpid())
