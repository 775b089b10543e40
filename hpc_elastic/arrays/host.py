"""Host arrays: what users hand in, seen as NumPy arrays without a copy, and nested structures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StepError

Array = NDArray[Any]
Rebuild = Callable[[list[Array]], Any]


def view(value: Any) -> Array:
    """Return `value` (NumPy array, TensorFlow tensor, number) as a NumPy array, without a copy where that is possible."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise StepError(f"can't sum a value of type {type(value).__name__} (dtype {array.dtype}): give numbers or arrays of them")
    return array


def flatten(tree: Any) -> tuple[list[Array], Rebuild]:
    """Return the arrays in `tree` (an array, or nested lists, tuples and dicts of them) and how to build it again."""
    if isinstance(tree, Mapping):
        keys = list(tree)
        parts, rebuild = flatten([tree[key] for key in keys])
        return parts, lambda arrays: dict(zip(keys, rebuild(arrays), strict=True))
    if isinstance(tree, (list, tuple)):
        leaves: list[Array] = []
        rebuilds: list[tuple[int, int, Rebuild]] = []
        for item in tree:
            arrays, rebuild = flatten(item)
            rebuilds.append((len(leaves), len(leaves) + len(arrays), rebuild))
            leaves += arrays
        kind = list if isinstance(tree, list) else tuple
        return leaves, lambda arrays: kind(rebuild(arrays[start:stop]) for start, stop, rebuild in rebuilds)
    return [view(tree)], lambda arrays: arrays[0]
