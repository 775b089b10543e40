"""The structure of an HDF5 file, made in memory, with a place for each array but without the arrays' content.

HDF5 would hold Python's lock while it writes, and would end the process (SIGSEGV) where the disk is full.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096


class Image(io.RawIOBase):
    """A file in memory of which only those pages exist that were written to; the rest is zeros."""

    def __init__(self) -> None:
        self.size = 0
        self._at = 0
        self._pages: defaultdict[int, bytearray] = defaultdict(lambda: bytearray(PAGE_BYTES))

    def content(self, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)``."""
        return b"".join(bytes(self._pages[page][place]) for page, place, _ in _runs(start, stop))

    # What h5py calls, as files have it.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        for page, place, part in _runs(self._at, self._at + len(data)):
            self._pages[page][place] = data[part]
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def readinto(self, data: Any) -> int:
        data[:] = self.content(self._at, self._at + len(data))
        self._at += len(data)
        return len(data)


def _runs(start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield the pages in which ``[start, stop)`` lies, with the places in the page and those counted from `start`."""
    at = start
    while at < stop:
        page, within = divmod(at, PAGE_BYTES)
        n = min(PAGE_BYTES - within, stop - at)
        yield page, slice(within, within + n), slice(at - start, at - start + n)
        at += n


def structure(sets: Sequence[tuple[str, NDArray[Any], Mapping[str, Any]]]) -> tuple[Image, list[int]]:
    """Return an HDF5 file with data sets for these names, arrays and attributes, and where each array's bytes belong."""
    import h5py

    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_layout(h5py.h5d.CONTIGUOUS)
    created.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    created.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    linked = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    linked.set_create_intermediate_group(True)
    image, offsets = Image(), []
    with h5py.File(image, "w") as file:
        for name, array, attributes in sets:
            dtype, shape = _form(array.dtype, array.shape)
            kind = h5py.h5t.py_create(dtype, logical=True)
            space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
            dataset = h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, created, linked))
            dataset.attrs.update({"dtype": array.dtype.str, **attributes})
            offsets.append(dataset.id.get_offset() or 0)  # an empty one has no place
    return image, offsets


def _form(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape with which HDF5 can hold the bytes of an array of `dtype` and `shape`."""
    if not dtype.itemsize:  # texts of no length
        return np.dtype(np.uint8), (*shape, 0)
    if dtype.kind == "U":
        return np.dtype(np.uint32).newbyteorder(dtype.byteorder), (*shape, dtype.itemsize // 4)
    if dtype.kind in "mM":
        return np.dtype(np.int64).newbyteorder(dtype.byteorder), shape
    return dtype, shape
