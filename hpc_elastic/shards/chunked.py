"""Fields stored in chunks, read and decompressed chunk by chunk; those that HDF5 has to read go the same way.

Most are read past HDF5, from where its index says that they are: that holds no lock while others compute.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError
from . import codecs
from .files import Field, ShardFile, advice, filters_of, opened, same_in_numpy
from .rows import Bytes

MADV_POPULATE_READ = 22  # Linux 5.14; not in the module mmap
BLOCK_BYTES = 1 << 20  # read at once from data sets that have no chunks and can't be mapped


class Chunks(Protocol):
    """One field of one file: `count` chunks of `length` samples, but for the last one."""

    length: int
    count: int

    def read(self, chunk: int, out: Bytes) -> None:
        """Read the samples of a chunk to the begin of `out`, which has the bytes of `length` samples."""
        ...


class Opened:
    """A file to read from.

    Parameters
    ----------
    path : Path
        Which file.
    mapped : bool
        Whether to map it as well, which saves copies and takes another descriptor.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self.descriptor)
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ) if mapped else None
        except OSError as error:
            raise ShardError(f"{path} can't be opened, {error.strerror}: {advice(error)}") from error
        self._bytes = np.frombuffer(self._map or b"", np.uint8)

    def bring(self, offset: int, nbytes: int) -> bool:
        """Have the kernel read these bytes into its cache; False if the file is not mapped, or they can't be read so."""
        if self._map is None:
            return False
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_READ, begin, offset + nbytes - begin)
        except (OSError, ValueError):
            return False
        return True

    def bytes_at(self, offset: int, nbytes: int) -> Bytes | None:
        """Return bytes where they are mapped; None if the file has become too short: touching them would end the process."""
        end = offset + nbytes
        return self._bytes[offset:end] if os.fstat(self.descriptor).st_size >= end else None


def chunks_of(file: ShardFile, name: str, source: Opened) -> Chunks:
    """Return the chunks of a field that is not mapped."""
    return Direct.of(file, name, source) or ThroughHdf5(file, name, source)


class ThroughHdf5:
    """What only HDF5 can read: types that it converts, filters of others, chunks of parts of samples, compact data."""

    def __init__(self, file: ShardFile, name: str, source: Opened) -> None:
        self._source = source
        self._file, self._name, self._field = file, name, file.fields[name]
        self.length = file.layouts[name].chunk or max(1, BLOCK_BYTES // max(1, self._field.nbytes))
        self.count = -(-file.samples // self.length)

    def read(self, chunk: int, out: Bytes) -> None:
        start = chunk * self.length
        stop = min(start + self.length, self._file.samples)
        with opened(self._file.path, self._source.descriptor) as file:
            _view(out, self._field)[: stop - start] = file[self._name][start:stop]


class Direct:
    """Chunks that are read from the file and undone by `codecs`."""

    def __init__(self, file: ShardFile, name: str, source: Opened, data: h5py.Dataset, filters: list[int]) -> None:
        self._source = source
        self._by_hdf5 = ThroughHdf5(file, name, source)
        self._itemsize = data.dtype.itemsize
        self._path, self._name, self._samples = file.path, name, file.samples
        self._field = file.fields[name]
        self.length = data.chunks[0]
        self.count = -(-file.samples // self.length)
        self._fill = np.asarray(data.fillvalue, self._field.dtype)
        self._filters = filters
        self._places = np.zeros((self.count, 3), np.int64)  # offset, bytes and skipped filters of each; no bytes: not there
        data.id.chunk_iter(self._note)
        self._brought = bytearray(self.count)  # 1: the kernel has read it where the file is mapped
        self._stored: Bytes | None = None  # for what can't be had there; filled again for each chunk

    @classmethod
    def of(cls, file: ShardFile, name: str, source: Opened) -> Direct | None:
        """Return the chunks of a field, or None if they have to go through HDF5."""
        with opened(file.path, source.descriptor) as stream:
            data = stream[name]
            filters = [code for code, _ in filters_of(data)]
            plain = data.chunks and data.chunks[1:] == data.shape[1:] and same_in_numpy(data)
            return cls(file, name, source, data, filters) if plain and codecs.known(filters) else None

    def _note(self, chunk: h5py.h5d.StoreInfo) -> None:
        self._places[chunk.chunk_offset[0] // self.length] = chunk.byte_offset, chunk.size, chunk.filter_mask

    def read(self, chunk: int, out: Bytes) -> None:
        offset, nbytes, skipped = self._places[chunk].tolist()
        if not nbytes:
            _view(out, self._field)[:] = self._fill
            return
        filters = [code for i, code in enumerate(self._filters) if not skipped >> i & 1] if skipped else self._filters
        try:
            codecs.decode(self._bytes_of(chunk, offset, nbytes, None if filters else out), filters, self._itemsize, out)
        except (codecs.DamagedError, OSError) as error:
            if self._samples < (chunk + 1) * self.length:  # the last one may be without filters, if that was asked for
                self._by_hdf5.read(chunk, out)
                return
            raise ShardError(
                f"{self._path} is truncated or damaged, copy or pack it again: chunk {chunk} of {self._name!r}, {error}"
            ) from error

    def _bytes_of(self, chunk: int, offset: int, nbytes: int, out: Bytes | None) -> Bytes:
        """Return a chunk as it is stored, in `out` if that is given."""
        if out is None and (self._brought[chunk] or self._source.bring(offset, nbytes)):
            self._brought[chunk] = True
            if (found := self._source.bytes_at(offset, nbytes)) is not None:
                return found
        if out is None:
            if self._stored is None:
                self._stored = np.empty(int(self._places[:, 1].max()), np.uint8)
            out = self._stored[:nbytes]
        return out[: os.preadv(self._source.descriptor, [out.data], offset)]


def _view(samples: Bytes, field: Field) -> NDArray[Any]:
    return samples.view(field.dtype).reshape(-1, *field.shape)
