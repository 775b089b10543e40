"""What HDF5's filters made of a chunk, undone: for those that are common, without HDF5 and without its lock."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .rows import Bytes

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

DEFLATE, SHUFFLE, ZSTD = 1, 2, 32015  # numbers of filters, as registered with the HDF Group

Buffer = bytes | memoryview | Bytes
UNREADABLE = (zlib.error, ValueError, *(() if zstandard is None else (zstandard.ZstdError,)))


class DamagedError(Exception):
    """A chunk is not what it should be."""


def known(filters: Sequence[int]) -> bool:
    """Tell whether `decode` undoes all of these."""
    return all(code in (DEFLATE, SHUFFLE) or (code == ZSTD and zstandard is not None) for code in filters)


def decode(data: Buffer, filters: Sequence[int], itemsize: int, out: Bytes) -> None:
    """Put into `out` what `filters`, in the order in which they were applied, made `data` of.

    Raises
    ------
    DamagedError
        If it can't be.
    """
    try:
        for code in reversed(filters):
            data = _undo(code, data, itemsize, out)
        if data is not out:
            out[:] = np.frombuffer(data, np.uint8)  # an error if the lengths differ
    except UNREADABLE as error:
        raise DamagedError(str(error)) from error


def _undo(code: int, data: Buffer, itemsize: int, out: Bytes) -> Buffer:
    if code == SHUFFLE:
        planes = np.frombuffer(data, np.uint8)
        if len(planes) != len(out):
            raise ValueError(f"it has {len(planes)} bytes instead of {len(out)}")
        return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)
    if code == DEFLATE:
        return zlib.decompress(np.frombuffer(data, np.uint8).data, bufsize=len(out))
    reader = _own.zstd.stream_reader(data)
    length = reader.readinto(out)
    if length != len(out) or reader.read(1):
        raise ValueError(f"it has {length} bytes or more instead of {len(out)}")
    return out


class _Own(threading.local):
    """A decompressor for each thread: they can't share one."""

    def __init__(self) -> None:
        self.zstd: Any = None if zstandard is None else zstandard.ZstdDecompressor()


_own = _Own()
