"""Adding up arrays along a tree, in stretches that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .order import Tree

Array = NDArray[Any]
STRETCH_BYTES = 1 << 17


def add_up(tree: Tree, operands: Sequence[Array], out: Array) -> None:
    """Put the sum of flat `operands` along `tree` into `out`, which may be the first of them."""
    if isinstance(tree, int):
        if operands[tree] is not out:
            np.copyto(out, operands[tree])
    elif isinstance(tree[0], int) and isinstance(tree[1], int):  # no result between that had to stay in the cache
        np.add(operands[tree[0]], operands[tree[1]], out=out)
    else:
        length = max(1, STRETCH_BYTES // out.itemsize)
        for start in range(0, len(out), length):
            stretch = slice(start, start + length)
            _add(tree, [operand[stretch] for operand in operands], out[stretch])


def _add(tree: tuple[Any, Any], operands: Sequence[Array], out: Array) -> None:
    left, right = tree
    if not isinstance(right, int):
        beside = np.empty_like(out)
        _add(right, operands, beside)
    else:
        beside = operands[right]
    if not isinstance(left, int):
        _add(left, operands, out)
        np.add(out, beside, out=out)
    else:
        np.add(operands[left], beside, out=out)
