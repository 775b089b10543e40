"""Shards: HDF5 files read as one set of samples. The only module of the runtime that imports h5py.

A shard's fields are the data sets in its root; all share their first axis, the samples. Contiguous data sets are mapped
where they lie in the file and gathered from there, past HDF5; others are read by whole chunks, of which some are kept.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CACHE_BYTES = 256 << 20  # of decompressed chunks, for each set
BLOCK_BYTES = 1 << 20  # read at once from data sets that have no chunks and can't be mapped
NUMBERED = re.compile(r"(.*)-\d+-of-(\d+)\.h5")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Field:
    """What one sample has in a field."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How a field lies in one file."""

    offset: int | None  # where its bytes begin, sample after sample; None if they are not stored like that
    chunk: int | None = None  # samples in a chunk
    compression: str = ""  # what its chunks went through, such as "shuffle+deflate"


@dataclass(frozen=True)
class ShardFile:
    """One file of a set."""

    path: Path
    samples: int
    fields: dict[str, Field]
    layouts: dict[str, Layout]
    classes: tuple[str, ...] = ()


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
        None if every field is contiguous in every file, else the length of the longest chunk, for `sampler.Order`.
    """

    def __init__(self, files: Sequence[ShardFile], cache_bytes: int = CACHE_BYTES) -> None:
        _check_alike(files)
        self.files = tuple(files)
        self.fields = files[0].fields
        self.classes = files[0].classes
        chunks = [layout.chunk for file in files for layout in file.layouts.values() if layout.chunk]
        self.chunk_samples = max(chunks, default=None)
        self._starts = np.cumsum([0, *(file.samples for file in files)])
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[tuple[int, str, int], Bytes] = OrderedDict()
        self._closed = False
        # Mapped now and not when needed: a mapping keeps the file that was checked, even if it is replaced meanwhile.
        self._maps = [_mapped(file) for file in files]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of all files; the set can't be read any more."""
        self._closed = True
        self._maps = []
        self._cached.clear()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the fields and of the files' lengths: ranks that opened the same data have the same."""
        fields = [(name, field.shape, field.dtype.descr) for name, field in self.fields.items()]
        content = json.dumps([fields, [file.samples for file in self.files]])
        return hashlib.sha256(content.encode()).hexdigest()

    def gather(self, samples: ArrayLike, out: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
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
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            wrong = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise ShardError(f"there is no sample {wrong} in this set of {len(self)} ({self.files[0].path}, ...)")
        arrays = {name: _target(name, field, len(numbers), out) for name, field in self.fields.items()}
        rows = {name: _rows(array, self.fields[name].nbytes) for name, array in arrays.items()}
        for number, places in _runs(np.searchsorted(self._starts, numbers, side="right") - 1):
            wanted = numbers[places] - self._starts[number]
            for name, target in rows.items():
                if name in self._maps[number]:
                    _copy(self._maps[number][name], wanted, target, places)
                else:
                    self._gather_blocks(number, name, wanted, target, places)
        return arrays

    def _gather_blocks(
        self, number: int, name: str, wanted: NDArray[np.int64], target: Bytes, places: NDArray[np.int64] | slice
    ) -> None:
        length = self.files[number].layouts[name].chunk or max(1, BLOCK_BYTES // max(1, self.fields[name].nbytes))
        where = np.arange(len(target))[places]
        for block, within in _runs(wanted // length):
            _copy(self._block(number, name, block, length), wanted[within] - block * length, target, where[within])

    def _block(self, number: int, name: str, block: int, length: int) -> Bytes:
        key = (number, name, block)
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        with _open(self.files[number].path) as file:
            data = np.ascontiguousarray(file[name][block * length : (block + 1) * length])
        self._cached[key] = _rows(data, self.fields[name].nbytes)
        while len(self._cached) > 1 and sum(rows.nbytes for rows in self._cached.values()) > self._cache_bytes:
            self._cached.popitem(last=False)
        return self._cached[key]


def _runs(keys: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64] | slice]]:
    """Yield each distinct key and the places at which it stands."""
    if len(keys) and (keys[0] == keys).all():  # the usual case of one file
        yield int(keys[0]), slice(None)
        return
    order = np.argsort(keys, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else ():
        yield int(keys[places[0]]), places


def _copy(source: Bytes, wanted: NDArray[np.int64], target: Bytes, places: NDArray[np.int64] | slice) -> None:
    """Copy the rows `wanted` of `source` to the rows `places` of `target`."""
    if isinstance(places, slice):  # mode="raise" would go through a buffer, and the numbers are checked
        np.take(source, wanted, axis=0, out=target[places], mode="clip")
    else:
        target[places] = np.take(source, wanted, axis=0, mode="clip")


def _rows(array: NDArray[Any], nbytes: int) -> Bytes:
    """Return `array` as bytes [n, nbytes]; np.take copies the *whole* of an unaligned or byte-swapped source."""
    return array.reshape(-1).view(np.uint8).reshape(len(array), nbytes)


def _target(name: str, field: Field, n: int, out: Mapping[str, NDArray[Any]] | None) -> NDArray[Any]:
    if out is None:
        return np.empty((n, *field.shape), dtype=field.dtype)
    array = out.get(name)
    if array is None or array.dtype != field.dtype or array.shape[1:] != field.shape or len(array) < n:
        got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise ShardError(f"out[{name!r}] must be an array {field.dtype} {[n, *field.shape]} or longer, not {got}")
    if not array.flags.c_contiguous:
        raise ShardError(f"out[{name!r}] must be C-contiguous")
    return array[:n]


def open_shards(where: str | Path | Sequence[str | Path], cache_bytes: int = CACHE_BYTES) -> ShardSet:
    """Open a file, all ``*.h5`` of a folder, all files that match a pattern, or all of a list of these, as one set.

    Up to `cache_bytes` of decompressed chunks are kept, if there are any: an order by chunks wants a window of them.

    Raises
    ------
    ShardError
        If nothing is found, or a file is missing, damaged, foreign or unlike the first; the message says what to do.
    """
    paths = [path for item in ([where] if isinstance(where, str | Path) else where) for path in _found(item)]
    if not paths:
        raise ShardError("no shards were named: give a file, a folder, a pattern such as 'digits/*.h5', or a list")
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise ShardError(f"{path} is named {times} times, so its samples would be repeated: name it once")
    return ShardSet([_described(path) for path in paths], cache_bytes)


def _found(where: str | Path) -> list[Path]:
    path = Path(where).expanduser()
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a folder above may not be searched
        found = sorted(path.glob("*.h5"))
        for name, count in {match.groups() for file in found if (match := NUMBERED.fullmatch(file.name))}:
            present = len(list(path.glob(f"{glob.escape(name)}-*-of-{count}.h5")))
            if present != int(count):
                raise ShardError(f"{path} has {present} of the {count} shards {name}-*-of-{count}.h5: bring the others")
    elif glob.has_magic(str(path)) and not os.path.lexists(path):
        found = [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207 - takes absolute patterns as well
    else:
        return [path]
    if not found:
        raise ShardError(f"there are no shards at {path}: write some with `hpc-elastic pack`, or correct the path")
    return found


@contextlib.contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        if not h5py.is_hdf5(path):
            with path.open("rb"):  # says why, if it can't be read at all
                raise ShardError(f"{path} is not an HDF5 file: convert it with `hpc-elastic pack`")
        # No locks: shards don't change once they have their name, and some network file systems can't lock.
        with h5py.File(path, "r", locking=False, rdcc_nbytes=0) as file:
            yield file
    except FileNotFoundError as error:
        raise ShardError(f"{path} does not exist: correct the path, or write it with `hpc-elastic pack`") from error
    except PermissionError as error:
        raise ShardError(f"{path} may not be read by this user: change its permissions") from error
    except (
        OSError,
        RuntimeError,
        KeyError,
        ValueError,
    ) as error:  # what h5py makes of damage differs from case to case
        raise ShardError(f"{path} is truncated or damaged, copy or pack it again: {error}") from error


def _described(path: Path) -> ShardFile:
    with _open(path) as file:
        sets = {name: file[name] for name in sorted(file) if file.get(name, getclass=True) is h5py.Dataset}
        if not sets:
            raise ShardError(f"{path} has no data set in its root, so it is not a shard: see `hpc-elastic pack`")
        for name, data in sets.items():
            if not data.shape:
                raise ShardError(f"{path}: {name!r} is a single value without samples: make it an attribute")
            if data.dtype.hasobject:
                raise ShardError(f"{path}: {name!r} has values of variable length: store it with a fixed shape and dtype")
            if data.is_virtual or data.external or data.file.filename != file.filename:
                raise ShardError(f"{path}: {name!r} has its data in other files: name those, or pack them into one")
        lengths = {name: data.shape[0] for name, data in sets.items()}
        if len(set(lengths.values())) > 1:
            raise ShardError(f"{path}: its fields have different numbers of samples, {lengths}: pack it again")
        fields = {name: Field(data.shape[1:], data.dtype) for name, data in sets.items()}
        layouts = {name: _layout(path, data) for name, data in sets.items()}
        classes = tuple(np.atleast_1d(file.attrs.get("classes", ())).astype(str).tolist())
    return ShardFile(path, next(iter(lengths.values())), fields, layouts, classes)


def _layout(path: Path, data: h5py.Dataset) -> Layout:
    if data.chunks:
        plist = data.id.get_create_plist()
        filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
        if not all(h5py.h5z.filter_avail(code) for code, *_ in filters):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")
        for code, _, _, name in filters:
            if not h5py.h5z.filter_avail(code):
                raise ShardError(f"{path}: {data.name} needs HDF5 filter {code} {name!r}: pip install hdf5plugin")
        return Layout(None, data.chunks[0], "+".join(name.decode() or str(code) for code, _, _, name in filters))
    offset = data.id.get_offset()
    if offset is not None and offset + data.nbytes > path.stat().st_size:
        raise ShardError(f"{path} is truncated, {data.name!r} goes on past its end: copy or pack it again")
    # Some types of HDF5 have no equal in NumPy; h5py converts them, so their bytes can't be taken as they are.
    same = data.id.get_type() == h5py.h5t.py_create(data.dtype, logical=True)
    return Layout(offset if same else None)


def _mapped(file: ShardFile) -> dict[str, Bytes]:
    """Map the fields of `file` that can be, as bytes [samples, nbytes of a sample]."""
    offsets = {name: layout.offset for name, layout in file.layouts.items() if layout.offset is not None}
    if not offsets:
        return {}
    try:
        whole: Bytes = np.memmap(file.path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:  # Python keeps a descriptor for each map
        advice = "pack fewer and larger shards, or raise `ulimit -n`" if error.errno == errno.EMFILE else "try again"
        raise ShardError(f"{file.path} can't be mapped, {error.strerror}: {advice}") from error
    nbytes = {name: file.fields[name].nbytes for name in offsets}
    return {
        name: whole[offset : offset + file.samples * nbytes[name]].reshape(file.samples, nbytes[name])
        for name, offset in offsets.items()
    }


def _check_alike(files: Sequence[ShardFile]) -> None:
    first = files[0]
    for file in files[1:]:
        for name in sorted(first.fields.keys() | file.fields.keys()):
            here, there = (each.fields.get(name) for each in (file, first))
            if here != there:
                raise ShardError(
                    f"{file.path} does not match {first.path}: field {name!r} is {here or 'absent'} here and "
                    f"{there or 'absent'} there; open them apart, or pack them in the same way"
                )
        if file.classes != first.classes:
            raise ShardError(f"{file.path} has classes {file.classes}, {first.path} {first.classes}: open them apart")
    if not any(file.samples for file in files):
        raise ShardError(f"there is no sample in {first.path} and the other files of this set: pack them again")


def write_shard(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], *, classes: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Write `arrays`, [n, ...] each and of a fixed dtype, as a shard with the names `classes` of the labels 0, 1, ...

    The whole file appears under its name, or nothing.

    Raises
    ------
    ShardError
        If the arrays don't make a shard, the file is already there, or it can't be written.
    """
    path = Path(path)
    fields = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if len({array.shape[:1] for array in fields.values()}) != 1 or any(not array.ndim for array in arrays.values()):
        lengths = {name: list(array.shape[:1]) for name, array in fields.items()}
        raise ShardError(f"{path}: a shard needs one or more fields with the same number of samples, not {lengths}")
    for name, array in fields.items():
        if array.dtype.hasobject or array.dtype.kind in "UmM" or "/" in name:
            raise ShardError(f"{path}: field {name!r} of {array.dtype} can't be stored; use numbers or fixed-size bytes")
    if path.exists() and not overwrite:
        raise ShardError(f"{path} is already there: overwrite it explicitly, or choose another name")
    # Made in memory: where the disk is full, HDF5 fails as it closes the file and takes the process with it (SIGSEGV).
    with h5py.File(image := io.BytesIO(), "w") as file:
        for name, array in fields.items():
            file.create_dataset(name, data=array)
        if classes:
            file.attrs["classes"] = list(classes)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(image.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        raise ShardError(f"{path} can't be written, {error.strerror}: free space or choose another folder") from error
    finally:
        beside.unlink(missing_ok=True)
