"""Writes checkpoints in the background, so that training goes on; failures become outcomes and nothing is raised."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..limits import AT_LIMIT
from .manifest import About
from .parts import Array, Rows
from .store import Store

POLL_S = 0.01
FULL = "the disk is full: free space, or set checkpoint_dir to another folder"
GONE = "the folder went away meanwhile: it is made anew with the next checkpoint"
FORBIDDEN = "change its permissions, or set checkpoint_dir to another folder"
ADVICE = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.ENOENT: GONE,
    errno.ESTALE: GONE,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: FORBIDDEN,
}


class Buffers:
    """Memory for snapshots, used again and again: a copy is fast where the memory is already mapped."""

    def __init__(self) -> None:
        self._held: list[Array] = []

    def copy(self, arrays: Sequence[Array]) -> list[Array]:
        """Return copies of `arrays`, C-contiguous, which are good until the next call."""
        sources = [np.asarray(array) for array in arrays]
        del self._held[len(sources) :]
        for i, source in enumerate(sources):
            if i == len(self._held):
                self._held.append(np.ndarray(source.shape, source.dtype))
            elif (self._held[i].shape, self._held[i].dtype) != (source.shape, source.dtype):
                self._held[i] = np.ndarray(source.shape, source.dtype)
            np.copyto(self._held[i], source)
        return list(self._held)


@dataclass(frozen=True)
class Outcome:
    """What became of a write.

    Attributes
    ----------
    about : About
        What was written.
    path : Path or None
        The checkpoint, in the process that committed it.
    error : str
        What went wrong and what to do about it, or nothing.
    seconds : float
        How long it took, with the wait for the other parts.
    bytes : int
        Bytes of this process's part.
    """

    about: About
    path: Path | None
    error: str
    seconds: float
    bytes: int


class Writer:
    """Writes the parts of one process, one after another, in a thread.

    Parameters
    ----------
    store : Store
        Where to.
    limit_s : float
        How long to wait for the other processes' parts.
    """

    def __init__(self, store: Store, limit_s: float = 600.0) -> None:
        self._store = store
        self._limit_s = limit_s
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Outcome] = deque()
        self._abandoned = threading.Event()

    @property
    def busy(self) -> bool:
        """True while something is under way, and the arrays must stay as they are."""
        return self._thread is not None and self._thread.is_alive()

    def write(
        self,
        about: About,
        part: int,
        parts: Iterable[int],
        header: bytes,
        arrays: Sequence[Array],
        rows: Sequence[Rows],
        *,
        commits: bool,
    ) -> None:
        """Begin to write `part` of the checkpoint `about`, and return; to be called while not `busy`.

        Parameters
        ----------
        about : About
            What it is of.
        part : int
            Number of this process's part; 0 has the state.
        parts : iterable of int
            The numbers of all parts.
        header : bytes
            Header of the registered state; empty but in part 0.
        arrays : sequence of array
            Arrays of the registered state; none but in part 0.
        rows : sequence of Rows
            Rows of the distributed arrays.
        commits : bool
            True in the process that waits for all parts and makes the checkpoint of them.
        """
        if self.busy:
            raise CheckpointError(f"checkpoint {about.name}: the one before is still being written; ask `busy` first")
        self._abandoned.clear()
        parts = tuple(parts)
        arguments = (about, part, parts, header, arrays, rows, commits)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # as many as the user may have
            self._thread = None
            if parts == (part,):
                self._run(*arguments)  # training stands still meanwhile
                return
            # Not to wait here for the others' parts, which may never come.
            text = f"checkpoint {about.name} was not written: {AT_LIMIT}"
            self._outcomes.append(Outcome(about, None, text, 0.0, 0))
            if not commits:
                self._store.give_up(about, part, text)

    def done(self) -> list[Outcome]:
        """Return what has come out since the last call."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def wait(self, limit_s: float) -> bool:
        """Wait until nothing is under way, `limit_s` seconds at most; tell whether that is so."""
        if self._thread is not None:
            self._thread.join(limit_s)
        return not self.busy

    def abandon(self) -> None:
        """Give up waiting for the other processes' parts."""
        self._abandoned.set()

    def _run(
        self,
        about: About,
        part: int,
        parts: tuple[int, ...],
        header: bytes,
        arrays: Sequence[Array],
        rows: Sequence[Rows],
        commits: bool,
    ) -> None:
        began = time.perf_counter()
        path, error = None, ""
        try:
            if commits:
                self._store.clean(but=about)
            self._store.write_part(about, part, header, arrays, rows)
            if commits:
                self._await(about, parts)
                path = self._store.commit(about, parts)
        except CheckpointError as problem:
            error = f"checkpoint {about.name}: {problem}"
        except OSError as problem:
            advice = ADVICE.get(problem.errno or 0, "see to the file system, or set checkpoint_dir to another folder")
            error = f"checkpoint {about.name} was not written to {self._store.folder}, {problem.strerror}: {advice}"
        except Exception as problem:  # noqa: BLE001  (training goes on, whatever it is)
            error = f"checkpoint {about.name} was not written: {type(problem).__name__}: {problem}"
        if error and commits:
            self._store.discard(about)  # a full disk needs the space
        elif error:
            self._store.give_up(about, part, error)
        nbytes = len(header) + sum(array.nbytes for array in arrays) + sum(each.values.nbytes for each in rows)
        self._outcomes.append(Outcome(about, path, error, time.perf_counter() - began, nbytes))

    def _await(self, about: About, parts: tuple[int, ...]) -> None:
        missing = set(parts)
        until = time.monotonic() + self._limit_s
        while missing := {part for part in missing if not self._store.ready(about, [part])}:
            if (why := self._store.given_up(about, missing)) is not None:
                raise CheckpointError(why or "a part could not be written, and not even that could be said")
            if self._abandoned.wait(POLL_S) or time.monotonic() > until:
                why = "it was given up" if self._abandoned.is_set() else f"they did not come within {self._limit_s:g} s"
                raise CheckpointError(
                    f"parts {', '.join(map(str, sorted(missing)))} are missing, {why}; the next is tried as usual"
                )
