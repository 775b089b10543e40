"""Tensors of fixed shapes packed into one flat tensor for each dtype, since what is exchanged costs by the tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class Flat:
    """How some tensors are packed.

    Parameters
    ----------
    tensors : sequence of tf.Tensor
        Tensors of the shapes and dtypes that they always have.
    """

    def __init__(self, tensors: Sequence[tf.Tensor]) -> None:
        self._forms = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        self.dtypes = list(dict.fromkeys(dtype for _, dtype in self._forms))
        self._sizes = {dtype: [math.prod(s) for s, other in self._forms if other == dtype] for dtype in self.dtypes}

    @property
    def specs(self) -> list[tf.TensorSpec]:
        """The flat tensors."""
        return [tf.TensorSpec([sum(self._sizes[dtype])], dtype) for dtype in self.dtypes]

    def pack(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return one flat tensor for each of `dtypes`."""
        parts: dict[Any, list[tf.Tensor]] = {dtype: [] for dtype in self.dtypes}
        for tensor in tensors:
            parts[tensor.dtype].append(tf.reshape(tensor, [-1]))
        return [tf.concat(part, 0) if len(part) > 1 else part[0] for part in parts.values()]

    def unpack(self, flat: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the tensors."""
        rest = {}
        for dtype, whole in zip(self.dtypes, flat, strict=True):
            sizes = self._sizes[dtype]
            rest[dtype] = iter(tf.split(whole, sizes) if len(sizes) > 1 else [whole])
        return [tf.reshape(next(rest[dtype]), shape) for shape, dtype in self._forms]
