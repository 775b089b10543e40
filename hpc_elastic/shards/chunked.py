"""Fields stored in chunks, read and decompressed chunk by chunk; those that HDF5 has to read go the same way.

Most are read past HDF5, from where its index says that they are: that holds no lock while others compute.
"""

from __future__ import annotations

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

BLOCK_BYTES = 1 << 20  # read at once from data sets that have no chunks and can't be mapped


class Chunks(Protocol):
    """One field of one file: `count` chunks of `length` samples, but for the last one."""

    length: int
    count: int

    def read(self, chunk: int, out: Bytes) -> None:
        """Read the samples of a chunk to the begin of `out`, which has the bytes of `length` samples."""
        ...


class Opened:
    """A file to read from."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path} can't be opened, {error.strerror}: {advice(error)}") from error
        weakref.finalize(self, os.close, self.descriptor)


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
        self._stored = np.empty(int(self._places[:, 1].max(initial=0)), np.uint8)  # filled again for each chunk

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
        stored = self._stored[:nbytes] if filters else out
        try:
            got = os.preadv(self._source.descriptor, [stored.data], offset)
            codecs.decode(stored if got == nbytes else stored[:got], filters, self._itemsize, out)
        except (codecs.DamagedError, OSError) as error:
            if self._samples < (chunk + 1) * self.length:  # the last one may be without filters, if that was asked for
                self._by_hdf5.read(chunk, out)
                return
            raise ShardError(
                f"{self._path} is truncated or damaged, copy or pack it again: chunk {chunk} of {self._name!r}, {error}"
            ) from error


def _view(samples: Bytes, field: Field) -> NDArray[Any]:
    return samples.view(field.dtype).reshape(-1, *field.shape)
