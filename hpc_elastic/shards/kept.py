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
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import ShardError
from .chunked import Chunks
from .rows import Bytes, Numbers, copy

WAIT_S = 0.25  # for a chunk that another process is about to read; then it is read twice
LOOK_S = 0.0005

Read = Callable[[int, Bytes], None]


class NoRoomError(Exception):
    """The host has no memory for chunks that processes share."""


class Places(Protocol):
    """Where chunks are kept: `slots` places, of bytes [slots, nbytes of a chunk]."""

    slots: int
    memory: Bytes

    def missing(self, chunks: Numbers) -> Numbers:
        """Return those of `chunks` that are not there; the others count as used now."""
        ...

    def fetch(self, chunks: Numbers, read: Read) -> None:
        """Have `chunks` there, at most `slots` of them and each named once."""
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
        self._firsts = np.cumsum([0, *(part.count for part in parts)])
        self.count = int(self._firsts[-1])
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()  # one thread may read ahead while another one reads something else
        _stores.add(self)
        self._closed = False
        self._places: Places = self._of_this_process()

    @property
    def _chunk_bytes(self) -> int:
        return max(1, self._length * self._nbytes)

    @property
    def shape(self) -> tuple[int, int]:
        """How many chunks there are, and bytes of each."""
        return self.count, self._chunk_bytes

    def _of_this_process(self) -> Recent:
        slots = max(1, min(self.count, self._budget_bytes // self._chunk_bytes))
        return Recent(self.count, slots, self._chunk_bytes)

    def share(self, path: Path) -> None:
        """Keep all chunks in the file `path`, in memory, with the other processes of this host.

        Raises
        ------
        OSError
            If the file can't be had, or is not what it should be. Then all stays as it was.
        """
        with self._lock:
            self._places = Shared(path, *self.shape)

    def unlock(self) -> None:
        """Be as before a read that another process was in."""
        if self._lock.locked():
            self._lock = threading.Lock()
            self._places = self._of_this_process()

    def close(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._closed = True
            self._places.close()

    def take(self, part: int, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """Copy the samples `wanted` of a part to the rows `places` of `target`."""
        chunks = wanted // self._parts[part].length
        with self._lock:
            if self._closed:
                raise ShardError("the shards were closed while they were read: open them again with open_shards")
            try:
                self._take(part, chunks, wanted, target, places)
            except NoRoomError:
                self._places.close()
                self._places = self._of_this_process()
                self._take(part, chunks, wanted, target, places)

    def _take(self, part: int, chunks: Numbers, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        needed = self._places.missing(chunks + self._firsts[part])
        if len(needed) == 0:
            self._copy(part, chunks, wanted, target, places)
            return
        needed = np.unique(chunks)
        for start in range(0, len(needed), self._places.slots):
            group = needed[start : start + self._places.slots]
            some = np.flatnonzero(np.isin(chunks, group))
            self._places.fetch(group + self._firsts[part], partial(self._read, part))
            self._copy(part, chunks[some], wanted[some], target, some if places is None else places[some])

    def _read(self, part: int, chunk: int, memory: Bytes) -> None:
        reader = self._parts[part]
        rows = memory[: reader.length * self._nbytes].reshape(reader.length, self._nbytes)
        reader.read(chunk - int(self._firsts[part]), rows)

    def _copy(self, part: int, chunks: Numbers, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        length = self._parts[part].length
        rows = self._places.memory[:, : self._length * self._nbytes].reshape(-1, self._nbytes)
        slots = self._places.slots_of(chunks + self._firsts[part])
        copy(rows, slots * self._length + (wanted - chunks * length), target, places)


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
        self._used = np.zeros(slots, np.int64)  # when, in calls
        self._calls = 0

    def missing(self, chunks: Numbers) -> Numbers:
        self._calls += 1
        found = self._slot_of[chunks]
        self._used[found[found >= 0]] = self._calls
        return chunks[found < 0]

    def fetch(self, chunks: Numbers, read: Read) -> None:
        missing = self.missing(chunks)
        slots = np.argsort(self._used, kind="stable")[: len(missing)]  # those used longest ago
        away = self._chunk_in[slots]
        self._slot_of[away[away >= 0]] = -1
        self._chunk_in[slots], self._used[slots] = -1, 0
        for chunk, slot in zip(missing.tolist(), slots.tolist(), strict=True):
            read(chunk, self.memory[slot])
        self._slot_of[missing], self._chunk_in[slots], self._used[slots] = slots, missing, self._calls

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

    def missing(self, chunks: Numbers) -> Numbers:
        missing = chunks[~self._seen[chunks]]
        if len(missing):
            # By system calls, which no processor puts into another order: first the chunk, then the byte.
            there = np.frombuffer(os.pread(self._file, self.slots, 0), bool)
            self._seen[missing] = there[missing]
            missing = missing[~there[missing]]
        return missing

    def fetch(self, chunks: Numbers, read: Read) -> None:
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
