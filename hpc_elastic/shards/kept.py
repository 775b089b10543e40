"""Decompressed chunks, kept within a budget: those used last by this process, or all of them by the host's processes."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import stat
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ..errors import ShardError
from .chunked import Chunks
from .rows import Bytes, Numbers, copy

WAIT_S = 0.25  # for a chunk that another process is about to read; then it is read twice
LOOK_S = 0.0005

T = TypeVar("T")
Read = Callable[[int, Bytes], None]


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
        self._places: Places = Recent(
            self.count, max(1, min(self.count, budget_bytes // self._chunk_bytes)), self._chunk_bytes
        )

    @property
    def _chunk_bytes(self) -> int:
        return max(1, self._length * self._nbytes)

    def share(self, path: Path) -> None:
        """Keep all chunks in the file `path`, in memory, with the other processes of this host, if the budget allows it."""
        nbytes = self.count * self._chunk_bytes
        if nbytes <= min(self._budget_bytes, shutil.disk_usage(path.parent).free):
            with contextlib.suppress(OSError):  # no room, or not ours: each keeps its own
                self._places = Shared(path, self.count, self._chunk_bytes)

    def close(self) -> None:
        """Let go of what is kept."""
        with self._lock:
            self._places.close()

    def take(self, part: int, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """Copy the samples `wanted` of a part to the rows `places` of `target`."""
        chunks = wanted // self._parts[part].length
        with self._lock:
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
        together(lambda chunk, slot: read(chunk, self.memory[slot]), missing.tolist(), slots.tolist())
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
        self._close = weakref.finalize(self, _close, self._file, path)
        os.ftruncate(self._file, self._begin + count * nbytes)  # of one that is there, the length it has
        whole = np.frombuffer(mmap.mmap(self._file, self._begin + count * nbytes), np.uint8)
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
        done = together(lambda chunk: self._claim(chunk, read), missing)
        for chunk in (chunk for chunk, claimed in zip(missing, done, strict=True) if not claimed):
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
            os.posix_fallocate(
                self._file, self._begin + chunk * self._nbytes, self._nbytes
            )  # else SIGBUS, if there is no room
        except OSError as error:
            raise ShardError(
                f"no memory for decompressed chunks in /dev/shm, {error.strerror}: make room, or open the shards with a "
                "smaller cache_bytes"
            ) from error
        self.memory[chunk] = beside
        os.pwrite(self._file, b"\1", chunk)
        self._seen[chunk] = True

    def close(self) -> None:
        self._close()
        self.slots, self.memory = 1, np.empty((1, 0), np.uint8)


def together(work: Callable[..., T], *arguments: Sequence[int]) -> list[T]:
    """Return what `work` returns for each of the `arguments`, done by as many threads as this process has cores."""
    threads = min(len(arguments[0]), len(os.sched_getaffinity(0)))
    if threads < 2:  # noqa: PLR2004
        return list(map(work, *arguments))
    # Made anew for each window of chunks, which takes some ms: threads that stay would not be there in a forked process.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, *arguments))


def _open_own(path: Path) -> int:
    """Open a file that is shared, or make it.

    Raises
    ------
    OSError
        If that can't be done, or it is somebody else's.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    found = os.fstat(file)
    if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
        os.close(file)
        raise PermissionError(f"{path} is not ours alone")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


def _close(file: int, path: Path) -> None:
    """Let go of a shared file; the last one to do so removes it."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    os.close(file)
