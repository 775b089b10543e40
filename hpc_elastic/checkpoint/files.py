"""Files that are there whole or not at all, and whose bytes are checked as they are read."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError

PIECE_BYTES = 4 << 20  # under one checksum, and written at once: fits into the cache. Part of the format.

# Not the file's fault: it may be good, and must not be given up.
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)

Bytes = NDArray[np.uint8]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class UnreadableError(CheckpointError):
    """A file may be good, but this process can't read it."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A run of bytes in a file, with the SHA-256 of each piece of `PIECE_BYTES`."""

    offset: Natural
    nbytes: Natural
    digests: tuple[str, ...]

    def sound(self, size: int) -> bool:
        """Tell whether it can be in a file of `size` bytes."""
        return self.offset + self.nbytes <= size and len(self.digests) == -(-self.nbytes // PIECE_BYTES)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[int]:
    """Give the descriptor of a new file, which gets the name `path` when all of it is on the disk, or goes away."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Put the names in `folder` on the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def put(descriptor: int, offset: int, data: memoryview | bytes) -> Span:
    """Write `data` at `offset`. Python's lock is free meanwhile, but for moments."""
    digests = []
    for start in range(0, len(data), PIECE_BYTES):
        piece = memoryview(data)[start : start + PIECE_BYTES]
        digests.append(hashlib.sha256(piece).hexdigest())
        done = 0
        while done < len(piece):
            done += os.pwrite(descriptor, piece[done:], offset + start + done)
    return Span(offset=offset, nbytes=len(data), digests=tuple(digests))


@dataclass(frozen=True)
class Reader:
    """A file open for reading."""

    path: Path
    descriptor: int

    def pieces(self, span: Span, start: int, stop: int) -> Iterator[tuple[int, Bytes]]:
        """Yield the bytes ``[start, stop)`` of `span`: places counted from `start`, and views that the next one reuses.

        Raises
        ------
        CheckpointError
            If they are not those that were written.
        """
        buffer = np.empty(min(PIECE_BYTES, span.nbytes), np.uint8)
        for number in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
            begin = number * PIECE_BYTES
            piece = buffer[: min(PIECE_BYTES, span.nbytes - begin)]
            self._fill(piece, span.offset + begin)
            if hashlib.sha256(piece.data).hexdigest() != span.digests[number]:
                raise CheckpointError(f"{self.path} is damaged, its checksum differs at byte {span.offset + begin}")
            first = max(start, begin)
            yield first - start, piece[first - begin : stop - begin]

    def _fill(self, piece: Bytes, offset: int) -> None:
        done = 0
        while done < len(piece):
            count = os.preadv(self.descriptor, [piece.data[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{self.path} is truncated, it ends at byte {offset + done}")
            done += count


@contextlib.contextmanager
def reading(path: Path, size: int | None = None) -> Iterator[Reader]:
    """Open `path`, which must be a plain file of `size` bytes.

    Raises
    ------
    CheckpointError
        If it is not, or is damaged; an `UnreadableError` if it may be good.
    """
    try:
        # Neither a link that leads out of the folder, nor a pipe to wait for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a file")
            if size is not None and found.st_size != size:
                raise CheckpointError(f"{path} is damaged, it has {found.st_size} bytes instead of {size}")
            yield Reader(path, descriptor)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        kind = UnreadableError if error.errno in OURS else CheckpointError
        raise kind(f"{path} can't be read: {error.strerror}") from error
