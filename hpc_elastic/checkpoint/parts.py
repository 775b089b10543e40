"""Parts: what one rank's file of a checkpoint holds. Arrays are written to their places in an HDF5 file, past HDF5."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import faults
from ..errors import CheckpointError
from .files import Bytes, Natural, Span, appearing, put
from .image import structure

PLAIN = "biufcSUmMV"  # kinds of dtypes whose arrays are all in their bytes
MOST_AXES = 32  # that HDF5 can have

Array = NDArray[Any]
Shape = tuple[Natural, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of a distributed array: `values` are those from `start` on, of an array of the global `shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    values: Array


class ArraySpan(Span, frozen=True, kw_only=True):
    """An array in a file."""

    dtype: str
    shape: Shape

    def sound(self, size: int) -> bool:
        """Tell whether it can be in a file of `size` bytes."""
        try:
            dtype = np.dtype(self.dtype)
        except (TypeError, ValueError, SyntaxError):
            return False
        fits = is_plain(dtype) and len(self.shape) <= MOST_AXES and self.nbytes == math.prod(self.shape) * dtype.itemsize
        return fits and super().sound(size)


class RowsSpan(ArraySpan, frozen=True, kw_only=True):
    """Rows of a distributed array in a file; `total` is the global shape."""

    name: str
    start: Natural
    total: Shape

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + self.shape[0]

    def sound(self, size: int) -> bool:
        """Tell whether it can be in a file of `size` bytes."""
        if not self.shape or not self.total or self.shape[1:] != self.total[1:]:
            return False
        return self.stop <= self.total[0] and super().sound(size)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one file holds; `rest` is HDF5's own."""

    number: Natural
    size: Natural
    header: Span
    arrays: tuple[ArraySpan, ...] = ()
    rows: tuple[RowsSpan, ...] = ()
    rest: tuple[Span, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"part-{self.number}.h5"

    @property
    def has_state(self) -> bool:
        """True if the registered state is in it."""
        return bool(self.header.nbytes or self.arrays)

    @property
    def spans(self) -> tuple[Span, ...]:
        """All bytes of the file."""
        return (self.header, *self.arrays, *self.rows, *self.rest)


def is_plain(dtype: np.dtype[Any]) -> bool:
    """Tell whether arrays of `dtype` are all in their bytes, and a text says all about it."""
    return not dtype.hasobject and dtype.kind in PLAIN and np.dtype(dtype.str) == dtype


def as_bytes(array: Array) -> Bytes:
    """Return the bytes of `array`: its own, if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)


def write(path: Path, number: int, header: bytes, arrays: Sequence[Array], rows: Sequence[Rows]) -> Part:
    """Write the file `path`, and return what is in it.

    Raises
    ------
    OSError
        If it can't be written; nothing of it is left then.
    CheckpointError
        If an array can't be stored.
    """
    head = np.frombuffer(header, np.uint8)
    sets: list[tuple[str, Array, Mapping[str, Any]]] = [("header", head, {})]
    sets += [(f"state/{i:04d}", _storable(array), {}) for i, array in enumerate(arrays)]
    sets += [(_place(each.name), _rows(each), {"start": each.start, "shape": each.shape}) for each in rows]
    image, offsets = structure(sets)
    with appearing(path) as descriptor:
        spans = [put(descriptor, offset, as_bytes(array).data) for offset, (_, array, _) in zip(offsets, sets, strict=True)]
        faults.at("write")
        rest = tuple(put(descriptor, start, image.content(start, stop)) for start, stop in _gaps(spans, image.size))
    forms = [
        {**msgspec.structs.asdict(span), "dtype": array.dtype.str, "shape": array.shape}
        for span, (_, array, _) in zip(spans, sets, strict=True)
    ]
    owned, shared = forms[1 : len(arrays) + 1], forms[len(arrays) + 1 :]
    return Part(
        number=number,
        size=image.size,
        header=spans[0],
        arrays=tuple(ArraySpan(**form) for form in owned),
        rows=tuple(
            RowsSpan(**form, name=each.name, start=each.start, total=tuple(each.shape))
            for form, each in zip(shared, rows, strict=True)
        ),
        rest=rest,
    )


def _storable(value: Array) -> Array:
    array = np.asarray(value)
    if not is_plain(array.dtype) or array.ndim > MOST_AXES:
        raise CheckpointError(
            f"an array of {array.dtype} with {array.ndim} axes can't be stored: use plain numbers or texts, one array for "
            f"each, with {MOST_AXES} axes at most"
        )
    return array


def _rows(rows: Rows) -> Array:
    array = _storable(rows.values)
    if array.dtype != np.dtype(rows.dtype) or array.shape[1:] != tuple(rows.shape[1:]):
        raise CheckpointError(
            f"rows {array.dtype} {list(array.shape)} are not of {rows.name!r}, {rows.dtype} {list(rows.shape)}: this is a "
            "fault of hpc_elastic, please report it"
        )
    return array


def _place(name: str) -> str:
    return f"rows/{'%2E' if name == '.' else quote(name, safe=' ')}"  # HDF5 has its own ideas of "a/b" and of "."


def _gaps(spans: Sequence[Span], size: int) -> Iterator[tuple[int, int]]:
    """Yield the runs ``[start, stop)`` of a file of `size` bytes that no span takes."""
    at = 0
    for start, stop in [*sorted((span.offset, span.offset + span.nbytes) for span in spans), (size, size)]:
        if start > at:
            yield at, start
        at = max(at, stop)
