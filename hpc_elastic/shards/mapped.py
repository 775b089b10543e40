"""Contiguous fields, mapped where they lie in their file: samples are read past HDF5."""

from __future__ import annotations

import mmap
import os

import numpy as np

from ..errors import ShardError
from .files import ShardFile, advice
from .rows import Bytes, Numbers, copy

FITS = 0.5  # of the host's memory: a set up to there is read ahead as a whole


class Mapping:
    """A file's memory map.

    Parameters
    ----------
    file : ShardFile
        Which file.
    """

    def __init__(self, file: ShardFile) -> None:
        try:
            with file.path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:  # Python keeps a descriptor for each map
            raise ShardError(f"{file.path} can't be mapped, {error.strerror}: {advice(error)}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)

    def advise(self, advice: int) -> None:
        """Tell the kernel what will be read, see madvise(2)."""
        self._map.madvise(advice)

    def rows(self, offset: int, samples: int, nbytes: int) -> Bytes:
        """Return the bytes [samples, nbytes] from `offset` on."""
        return self._bytes[offset : offset + samples * nbytes].reshape(samples, nbytes)

    def fetch(self, offset: int, nbytes: int) -> None:
        """Have the kernel read these bytes into its cache, in one go."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, start, min(offset + nbytes, len(self._map)) - start)


class Mapped:
    """One field of one file.

    Parameters
    ----------
    mapping : Mapping
        Of the file.
    offset, samples, nbytes : int
        Where its bytes begin; samples; bytes of each.
    block : int or None
        Samples that are read from the disk together, when the first of them is wanted.
    """

    def __init__(self, mapping: Mapping, offset: int, samples: int, nbytes: int, block: int | None) -> None:
        self._rows = mapping.rows(offset, samples, nbytes)
        self._mapping, self._offset, self._block = mapping, offset, block
        self._last = np.empty(0, np.int64)  # blocks that were read from last

    def take(self, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """Copy the samples `wanted` to the rows `places` of `target`."""
        if self._block:
            self._fetch(np.unique(wanted // self._block), self._block)
        copy(self._rows, wanted, target, places)

    def _fetch(self, blocks: Numbers, length: int) -> None:
        nbytes = self._rows.shape[1]
        for block in np.setdiff1d(blocks, self._last, assume_unique=True).tolist():
            self._mapping.fetch(self._offset + block * length * nbytes, length * nbytes)
        self._last = blocks


def advise(mappings: list[Mapping], nbytes: int, block: int | None) -> bool:
    """Tell the kernel how a set of `nbytes` will be read; False if it is larger than memory and has no blocks."""
    if nbytes <= FITS * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE:
        how = mmap.MADV_WILLNEED
    elif block:
        return True
    else:
        how = mmap.MADV_RANDOM
    for mapping in mappings:
        mapping.advise(how)
    return how == mmap.MADV_WILLNEED
