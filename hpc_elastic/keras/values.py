"""Values between Keras and hpc_elastic: tensors for what is on a GPU, digests of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import gpu
from ..arrays.host import GPU, flatten

ALIGNED = 64  # bytes, where TensorFlow's kernels want an array to begin


def lent(array: Any) -> Any:
    """Return a tensor of an array, in the memory of that where TensorFlow can work there; else of a copy.

    The array must stay as it is as long as there is the tensor, which holds it.
    """
    import tensorflow as tf

    if not (isinstance(array, np.ndarray) and array.dtype.kind in "fiu" and array.dtype.isnative and array.size):
        return tf.constant(array)
    # DLPack has no word for arrays that are not contiguous and writable.
    if not array.flags.carray or _address(array) % ALIGNED:
        array = _aligned(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy that TensorFlow can work with: to lend that takes a fraction of the time of ``tf.constant``."""
    memory = np.empty(array.nbytes + ALIGNED, np.uint8)
    start = -_address(memory) % ALIGNED
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, memory, start)
    copy[...] = array
    return copy


def loans(arrays: Sequence[Any]) -> list[np.ndarray]:
    """Return views by which memory that is filled again can be `lent`, of read-only arrays too: nothing writes to them.

    Of views `arrays.host.held` tells whether there still is a tensor, or a variable that keeps that memory for its value.
    """
    found = [np.asarray(array).view() for array in arrays]
    for view in found:
        view.flags.writeable = True
    return found


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
