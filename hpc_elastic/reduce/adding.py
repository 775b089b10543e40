"""Adding up arrays along a tree, in stretches that stay in the processor's cache; on a GPU, by CuPy, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays.host import Array
from .half import plus
from .order import Tree

STRETCH_BYTES = 1 << 17


def add_up(tree: Tree, operands: Sequence[Array], out: Array, stretch_bytes: int = STRETCH_BYTES) -> None:
    """Put the sum of flat `operands` along `tree` into `out`."""
    if isinstance(tree, int):
        np.copyto(out, operands[tree])
    elif isinstance(tree[0], int) and isinstance(tree[1], int):  # no result between that had to stay in the cache
        plus(operands[tree[0]], operands[tree[1]], out)
    else:
        length = max(1, stretch_bytes // out.itemsize)
        for start in range(0, len(out), length):
            stretch = slice(start, start + length)
            _sum(tree, [operand[stretch] for operand in operands], out[stretch])


def _sum(tree: Tree, operands: Sequence[Array], out: Array | None = None) -> Array:
    """Return the sum, which is in `out` unless there is nothing to add."""
    if isinstance(tree, int):
        return operands[tree]
    left, right = tree
    if out is None:
        out = np.empty_like(operands[0])
    plus(_sum(left, operands, out), _sum(right, operands), out)
    return out
