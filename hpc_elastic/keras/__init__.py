"""Keras models in elastic jobs: `fit`, `evaluate` and `predict` by ranks that come and go, with the same bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset import Data, data
    from .elasticity import Elasticity
    from .leading import OnLeader
    from .settings import same_bits
    from .state import State
    from .values import tensors, weights_sha256

__all__ = ["Data", "Elasticity", "OnLeader", "State", "data", "same_bits", "tensors", "weights_sha256"]

# Loaded when they are first used: TensorFlow reads its settings when it is, so `same_bits` comes before.
_LAZY = {
    "Data": "dataset",
    "Elasticity": "elasticity",
    "OnLeader": "leading",
    "State": "state",
    "data": "dataset",
    "same_bits": "settings",
    "tensors": "values",
    "weights_sha256": "values",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("." + _LAZY[name], __name__), name)
