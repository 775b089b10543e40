"""Values between Keras and hpc_elastic: tensors for what is on a GPU, digests of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import gpu
from ..arrays.host import GPU, flatten


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
