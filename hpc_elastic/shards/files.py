"""Shard files: which there are, and what they hold. With `chunked` and `writing`, what speaks to HDF5."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from ..errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUMBERED = re.compile(r"(.*)-\d+-of-(\d+)\.h5")


@dataclass(frozen=True)
class Field:
    """What one sample has in a field."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @cached_property
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


def found_at(where: str | Path) -> list[Path]:
    """Return the files that `where` names: a file, a folder, or a pattern."""
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
def opened(path: Path, descriptor: int | None = None) -> Iterator[h5py.File]:
    """Open a file with HDF5; what goes wrong with it is a `ShardError` that says what to do.

    With a `descriptor` it is that of this file, even if another one has its name by now.
    """
    try:
        if descriptor is not None:
            again = Path(f"/proc/self/fd/{descriptor}")  # opened anew: two sets may read at a time
            with again.open("rb") as stream, h5py.File(stream, "r", rdcc_nbytes=0) as file:
                yield file
            return
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
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # what h5py makes of damage differs from case to case
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            raise ShardError(f"{path} can't be opened, too many files are open: {advice(error)}") from error
        raise ShardError(f"{path} is truncated or damaged, copy or pack it again: {error}") from error


def advice(error: OSError) -> str:
    """Return what to do about a file that can't be opened or mapped."""
    return "pack fewer and larger shards, or raise `ulimit -n`" if error.errno == errno.EMFILE else "try again"


def described(path: Path) -> ShardFile:
    """Return what a file holds."""
    with opened(path) as file:
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
        fields = {name: _field(data) for name, data in sets.items()}
        layouts = {name: _layout(path, data) for name, data in sets.items()}
        classes = tuple(np.atleast_1d(file.attrs.get("classes", ())).astype(str).tolist())
    return ShardFile(path, next(iter(lengths.values())), fields, layouts, classes)


def _field(data: h5py.Dataset) -> Field:
    base, shape = data.dtype.subdtype or (data.dtype, ())  # NumPy has no arrays of arrays: those are axes more
    return Field(data.shape[1:] + shape, base)


def _layout(path: Path, data: h5py.Dataset) -> Layout:
    if data.chunks:
        filters = filters_of(data)
        if not all(h5py.h5z.filter_avail(code) for code, _ in filters):
            with contextlib.suppress(ImportError):
                importlib.import_module("hdf5plugin")
        for code, name in filters:
            if not h5py.h5z.filter_avail(code):
                raise ShardError(f"{path}: {data.name} needs HDF5 filter {code} {name!r}: pip install hdf5plugin")
        return Layout(None, data.chunks[0], "+".join(_short(name) or str(code) for code, name in filters))
    offset = data.id.get_offset()
    if offset is not None and offset + data.nbytes > path.stat().st_size:
        raise ShardError(f"{path} is truncated, {data.name!r} goes on past its end: copy or pack it again")
    return Layout(offset if same_in_numpy(data) else None)


def filters_of(data: h5py.Dataset) -> list[tuple[int, bytes]]:
    """Return number and name of each filter that chunks went through, in this order."""
    plist = data.id.get_create_plist()
    found = (plist.get_filter(i) for i in range(plist.get_nfilters()))
    return [(code, name) for code, _, _, name in found]


def _short(name: bytes) -> str:
    """Return a filter's name without what it says of where it is from."""
    return name.decode(errors="replace").partition(";")[0].removeprefix("HDF5 ").removesuffix(" filter")


def same_in_numpy(data: h5py.Dataset) -> bool:
    """Tell whether the bytes can be taken as they are; types of HDF5 without an equal in NumPy are converted by h5py."""
    return bool(data.id.get_type() == h5py.h5t.py_create(data.dtype, logical=True))


def check_alike(files: Sequence[ShardFile]) -> None:
    """Check that `files` make one set."""
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
