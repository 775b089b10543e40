"""Values between Keras and hpc_elastic: tensors for what is on a GPU, digests of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import gpu
from ..arrays.host import GPU, flatten

ALIGNED = 64  # bytes, where TensorFlow's kernels want an array to begin


def lent(array: Any) -> Any:
    """Return a tensor of an array, in the memory of that where TensorFlow can work there; else a copy.

    The array must stay as it is as long as there is the tensor, which holds it.
    """
    import tensorflow as tf

    if (
        isinstance(array, np.ndarray)
        and array.dtype.kind in "fiu"
        and array.dtype.isnative
        and array.flags.carray  # contiguous and writable: DLPack has no word for other arrays
        and not array.__array_interface__["data"][0] % ALIGNED
    ):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.constant(array)


def tensors(values: Any) -> Any:
    """Return `values`, nested as ``step.reduce()`` gives them, with TensorFlow's tensors for what is on a GPU.

    Nothing is copied: a tensor is valid as long as the array. NumPy arrays stay as they are, which TensorFlow takes as well.
    """
    arrays, structure = flatten(values)
    places = structure.places()
    if GPU in places:
        import tensorflow as tf

        arrays = [
            tf.experimental.dlpack.from_dlpack(gpu.lend(array)) if place == GPU else array
            for place, array in zip(places, arrays, strict=True)
        ]
    return structure.build(iter(arrays))


def weights_sha256(weights: Sequence[Any]) -> str:
    """Return the SHA-256 of arrays, one after the other in their order: equal bits give equal digests."""
    import hashlib

    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
