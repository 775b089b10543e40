"""Keras models in elastic jobs: their state, and the settings without which their bits depend on the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import gpu
from .arrays.host import GPU, flatten
from .errors import ConfigError


def same_bits(*, threads: int = 1, seed: int = 0) -> None:
    """Make TensorFlow compute the same bits on every rank. To be called before the first operation.

    Parameters
    ----------
    threads : int
        Threads within an operation; another number gives other bits, so it is the same on all ranks.
    seed : int
        Seed of the initial weights.

    Raises
    ------
    ConfigError
        If TensorFlow is running already.

    Notes
    -----
    Sets op determinism, which forbids operations whose result depends on timing; switches the graph's arithmetic
    optimisation off, which reorders sums; and fixes the threads, since a sum cut in two rounds otherwise than in one.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    import keras

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        raise ConfigError("he.keras.same_bits() must come before the first TensorFlow operation") from error
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


class State:
    """State of a Keras model and its optimizer, for `Job.register`.

    Parameters
    ----------
    model : keras.Model
        A built model.
    optimizer : keras.Optimizer, optional
        Its optimizer; built here if it is not yet.
    """

    def __init__(self, model: Any, optimizer: Any = None) -> None:
        if not model.built:
            raise ConfigError("he.keras.State needs a built model: give it an Input layer, or call it once")
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._variables: list[Any] = list(model.variables) + (list(optimizer.variables) if optimizer is not None else [])

    def state(self) -> dict[str, Any]:
        """Return all variables, in their order."""
        return {str(index): np.asarray(variable) for index, variable in enumerate(self._variables)}

    def load(self, state: dict[str, Any]) -> None:
        """Assign all variables.

        Raises
        ------
        ConfigError
            If there are more or fewer than this model has.
        """
        if len(state) != len(self._variables):
            raise ConfigError(f"received {len(state)} variables, but this model and optimizer have {len(self._variables)}")
        for index, variable in enumerate(self._variables):
            variable.assign(state[str(index)])


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
