"""Shards as one set of samples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ShardError
from ..places import SHARED_MEMORY, shared_files, shared_memory
from .chunked import Opened, chunks_of
from .files import Field, ShardFile, check_alike, described, found_at
from .kept import Store, remove_unused
from .mapped import Mapped, Mapping, advise
from .rows import Bytes, Numbers, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from collections.abc import Mapping as Arrays

CACHE_BYTES = 1 << 30  # of decompressed chunks

log = logging.getLogger(__name__)


class Source(Protocol):
    """One field of one file."""

    def take(self, wanted: Numbers, target: Bytes, places: Numbers | None) -> None: ...


class InStore:
    """A part of a `Store`."""

    def __init__(self, store: Store, part: int) -> None:
        self._store, self._part = store, part

    def take(self, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """Copy the samples `wanted` to the rows `places` of `target`."""
        self._store.take(self._part, wanted, target, places)


class Nothing:
    """A field whose samples have no bytes."""

    def take(self, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
        """There is nothing to copy."""


class ShardSet(contextlib.AbstractContextManager["ShardSet"]):
    """Shards as one set of samples, numbered through all files in their order.

    Attributes
    ----------
    files : tuple of ShardFile
        The files, in order.
    fields : dict of str to Field
        The fields that all files have, by name.
    classes : tuple of str
        Names of the labels 0, 1, ...; empty if the shards don't say.
    chunk_samples : int or None
        None if the samples can be read in any order; else the length of the longest chunk, or of the blocks that were
        asked for. For `sampler.Order`.
    reads_ahead : bool
        True: a job's steps may call `gather` in a thread of their own, and give it the arrays to fill.
    """

    reads_ahead = True

    def __init__(self, files: Sequence[ShardFile], cache_bytes: int = CACHE_BYTES, block_samples: int | None = None) -> None:
        check_alike(files)
        self.files = tuple(files)
        self.fields = files[0].fields
        self.classes = files[0].classes
        chunks = [layout.chunk for file in files for layout in file.layouts.values() if layout.chunk]
        self.chunk_samples = max([*chunks, *([block_samples] if block_samples else [])], default=None)
        self._starts = np.cumsum([0, *(file.samples for file in files)])
        self._length = int(self._starts[-1])
        self._cache_bytes = cache_bytes
        self._closed = False
        self._stores: dict[str, Store] = {}
        self._files: dict[int, Opened] = {}
        self._sources: list[list[Source]] = []
        self._open(cache_bytes, block_samples)

    def _open(self, cache_bytes: int, block_samples: int | None) -> None:
        # Mapped now and not when needed: a mapping keeps the file that was checked, even if it is replaced meanwhile.
        mapped = [any(layout.offset is not None for layout in file.layouts.values()) for file in self.files]
        mappings = [Mapping(file) if there else None for file, there in zip(self.files, mapped, strict=True)]
        nbytes = sum(self.fields[name].nbytes * file.samples for name in self.fields for file in self.files)
        if not advise([mapping for mapping in mappings if mapping], nbytes, block_samples):
            log.warning(
                "%s, ... is larger than half of this host's memory (%.1f GB): samples at random would be read one by one; "
                "open_shards(..., block_samples=N) reads N together, and shuffles within windows of such blocks",
                self.files[0].path,
                nbytes / 1e9,
            )
        chunked: dict[str, list[int]] = {
            name: [i for i, file in enumerate(self.files) if file.layouts[name].offset is None and file.samples]
            for name, field in self.fields.items()
            if field.nbytes
        }
        share = sum(self.fields[name].nbytes for name, where in chunked.items() if where)
        for name, where in chunked.items():
            if where:
                budget = cache_bytes * self.fields[name].nbytes // max(1, share)
                parts = [chunks_of(self.files[i], name, self._opened(i)) for i in where]
                self._stores[name] = Store(parts, self.fields[name].nbytes, budget)
        for i, (file, mapping) in enumerate(zip(self.files, mappings, strict=True)):
            row: list[Source] = []
            for name, field in self.fields.items():
                offset = file.layouts[name].offset
                if not field.nbytes:
                    row.append(Nothing())
                elif offset is not None and mapping is not None:
                    row.append(Mapped(mapping, offset, file.samples, field.nbytes, block_samples))
                elif file.samples:
                    row.append(InStore(self._stores[name], chunked[name].index(i)))
            self._sources.append(row)

    def _opened(self, number: int) -> Opened:
        """Return a file, opened once for all its fields that have chunks."""
        if number not in self._files:
            few = len(self.files) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
            self._files[number] = Opened(self.files[number].path, mapped=few)
        return self._files[number]

    def __len__(self) -> int:
        return self._length

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files; the set can't be read any more."""
        self._closed = True
        self._sources = []
        for store in self._stores.values():
            store.close()
        self._stores, self._files = {}, {}

    def share_chunks(self, key: str) -> None:
        """Keep decompressed chunks together with the processes of this host that call this with the same `key`.

        Only if all chunks fit into the budget, and into the host's shared memory; else each process keeps those it used
        last. What processes that were killed have left there is removed.
        """
        if not self._stores:
            return
        paths = {name: self._shared_file(key, name) for name in self._stores}
        nbytes = sum(count * each for count, each in (store.shape for store in self._stores.values()))
        with contextlib.suppress(OSError):
            remove_unused(set(shared_files()) - set(paths.values()))
            there = sum(path.stat().st_blocks * 512 for path in paths.values() if path.exists())
            if nbytes <= min(self._cache_bytes, shutil.disk_usage(SHARED_MEMORY).free + there):
                for name, store in self._stores.items():
                    store.share(paths[name])

    def _shared_file(self, key: str, name: str) -> Path:
        """Return the file for a field's chunks: another one for other content."""
        found = [(str(self.files[i].path), os.fstat(opened.descriptor)) for i, opened in sorted(self._files.items())]
        which = [(path, one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found]
        digest = hashlib.sha256(json.dumps([key, name, self._stores[name].shape, which]).encode())
        return shared_memory(digest.hexdigest()[:24])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the fields, of the files' lengths and of chunks: ranks that opened the same data have the same."""
        fields = [(name, field.shape, field.dtype.descr) for name, field in self.fields.items()]
        chunks = [self.chunk_samples] if self.chunk_samples else []  # the order depends on it
        content = json.dumps([fields, [file.samples for file in self.files], *chunks])
        return hashlib.sha256(content.encode()).hexdigest()

    def gather(self, samples: ArrayLike, out: Arrays[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        """Return the samples with the given numbers: for each field an array of shape [n, *shape].

        Parameters
        ----------
        samples : array of int, shape [n]
            Numbers from 0 to ``len(self) - 1``, in any order, repeated at will.
        out : mapping of str to array, optional
            Where to put them: a C-contiguous array of shape [m, *shape], m >= n, for each field. Its first n rows are
            returned.

        Raises
        ------
        ShardError
            If a number is out of range, `out` does not fit, the set is closed, or a file can't be read any more.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        if self._closed:
            raise ShardError(f"the shards were closed ({self.files[0].path}, ...): open them again with open_shards")
        # As argmin and argmax, which take a quarter of the time of min and max.
        if len(numbers) and (numbers[numbers.argmin()] < 0 or numbers[numbers.argmax()] >= self._length):
            wrong = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise ShardError(f"there is no sample {wrong} in this set of {len(self)} ({self.files[0].path}, ...)")
        arrays, rows = {}, []
        for name, field in self.fields.items():
            arrays[name] = array = _target(name, field, len(numbers), out)
            rows.append(rows_of(array, field.nbytes))
        for number, places in self._files_of(numbers):
            wanted = numbers if places is None else numbers[places] - self._starts[number]
            for source, target in zip(self._sources[number], rows, strict=True):
                source.take(wanted, target, places)
        return arrays

    def _files_of(self, numbers: Numbers) -> Iterator[tuple[int, Numbers | None]]:
        """Yield each file that has some of the samples, and which these are; None is all of a single file's."""
        if not len(numbers):
            return
        if len(self.files) == 1:
            yield 0, None
            return
        files = np.searchsorted(self._starts, numbers, side="right") - 1
        order = np.argsort(files, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(files[order])) + 1):
            yield int(files[places[0]]), places


def _target(name: str, field: Field, n: int, out: Arrays[str, NDArray[Any]] | None) -> NDArray[Any]:
    if out is None:
        return np.empty((n, *field.shape), dtype=field.dtype)
    array = out.get(name)
    if array is None or array.dtype != field.dtype or array.shape[1:] != field.shape or len(array) < n:
        got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise ShardError(f"out[{name!r}] must be an array {field.dtype} {[n, *field.shape]} or longer, not {got}")
    if not array.flags.c_contiguous:
        raise ShardError(f"out[{name!r}] must be C-contiguous")
    return array[:n]


def open_shards(
    where: str | Path | Sequence[str | Path], cache_bytes: int = CACHE_BYTES, block_samples: int | None = None
) -> ShardSet:
    """Open a file, all ``*.h5`` of a folder, all files that match a pattern, or all of a list of these, as one set.

    Parameters
    ----------
    where : str, Path, or sequence of these
        Which files.
    cache_bytes : int
        Up to so many bytes of decompressed chunks are kept: in a job, by all ranks of a host together if all chunks fit
        into that, so that each is decompressed once; else by each rank those that it used last.
    block_samples : int, optional
        For contiguous data larger than memory: so many samples, some MB, are read together, and samples are shuffled
        within windows of such blocks, as they are with chunks.

    Raises
    ------
    ShardError
        If nothing is found, or a file is missing, damaged, foreign or unlike the first; the message says what to do.
    """
    if block_samples is not None and not (isinstance(block_samples, int) and block_samples >= 1):
        raise ShardError(f"block_samples = {block_samples} must be a whole number, at least 1")
    paths = [path for item in ([where] if isinstance(where, str | Path) else where) for path in found_at(item)]
    if not paths:
        raise ShardError("no shards were named: give a file, a folder, a pattern such as 'digits/*.h5', or a list")
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise ShardError(f"{path} is named {times} times, so its samples would be repeated: name it once")
    return ShardSet([described(path) for path in paths], int(cache_bytes), block_samples)
