"""Samples as rows of bytes, and copying some of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
LARGE_BYTES = 1 << 14  # rows from here on are copied one by one, rather than twice


def rows_of(array: NDArray[Any], nbytes: int) -> Bytes:
    """Return `array` as bytes [n, nbytes]; np.take copies the *whole* of an unaligned or byte-swapped source."""
    return array.view(np.uint8).reshape(len(array), nbytes) if array.size else np.empty((len(array), nbytes), np.uint8)


def copy(source: Bytes, wanted: Numbers, target: Bytes, places: Numbers | None) -> None:
    """Copy the rows `wanted` of `source`, which must be there, to the rows `places` of `target`, or to all in order."""
    if places is None:  # mode="raise" would go through a buffer, and the numbers are checked
        source.take(wanted, 0, target, "clip")
    elif source.shape[1] < LARGE_BYTES:
        target[places] = source.take(wanted, 0, None, "clip")
    else:
        for place, row in zip(places.tolist(), wanted.tolist(), strict=True):
            target[place] = source[row]
