"""Sums of values of two bytes: how wider ones are rounded to them, and how they are added up.

Each value is rounded when it is contributed, and each result of an addition is, to the nearest, ties to even. So nothing
is lost where messages happen to be sent, and the bits stay the same at any number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Array, is_float
from ..errors import ConfigError

# The upper half of a float32. NumPy has no such dtype, and one that is not a number's is not taken for whole numbers.
BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
WIRES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}
NAN = 0x7FC0
STRETCH = 1 << 15  # values at a time: what is between stays in the processor's cache


def wire_of(name: str | None) -> np.dtype[Any] | None:
    """Return the dtype of this name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name is not None and (not isinstance(name, str) or name not in WIRES):
        raise ConfigError(f"wire={name!r}: take {' or '.join(map(repr, WIRES))}, or None for the arrays' own precision")
    return None if name is None else WIRES[name]


def kept_as(dtype: np.dtype[Any], wire: np.dtype[Any] | None) -> np.dtype[Any]:
    """Return as what values of `dtype` are added up."""
    return wire if wire is not None and is_float(dtype) and dtype.itemsize > wire.itemsize else dtype


def store(values: Array, weight: float | None, out: Array) -> None:
    """Put `values`, times `weight` if there is one, into `out`, which is contiguous; rounded where it is narrower."""
    if values.dtype == out.dtype:
        if weight is None:
            np.copyto(out, values)
        else:
            np.multiply(values, values.dtype.type(weight), out=out)
        return
    flat, target = values.reshape(-1), out.reshape(-1)
    for start in range(0, len(flat), STRETCH):
        stretch = slice(start, start + STRETCH)
        part = flat[stretch] if weight is None else flat[stretch] * values.dtype.type(weight)
        if out.dtype == BFLOAT16:
            _round(part.astype(np.float32, copy=False), target[stretch].view(np.uint16))
        else:
            np.copyto(target[stretch], part, casting="same_kind")


def load(values: Array, out: Array) -> None:
    """Put contiguous `values` into the wider `out`, which changes none of them."""
    if values.dtype == BFLOAT16:
        flat, target = values.reshape(-1).view(np.uint16), out.reshape(-1)
        for start in range(0, len(flat), STRETCH):
            target[start : start + STRETCH] = _wide(flat[start : start + STRETCH])
    else:
        np.copyto(out, values)


def plus(left: Array, right: Array, out: Array) -> None:
    """Put the sum of flat arrays into `out`."""
    if out.dtype != BFLOAT16:
        np.add(left, right, out=out)
        return
    a, b, target = (array.view(np.uint16) for array in (left, right, out))
    for start in range(0, len(target), STRETCH):
        stretch = slice(start, start + STRETCH)
        wide = _wide(a[stretch])
        np.add(wide, _wide(b[stretch]), out=wide)
        _round(wide, target[stretch])


def _wide(upper: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 of which these are the upper halves."""
    bits = upper.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def _round(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Put the upper halves of `values` into `out`, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)  # a carry beyond the largest number makes infinity, as it should
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    if np.isnan(values).any():
        out[np.isnan(values)] = NAN  # or it could be rounded to infinity
