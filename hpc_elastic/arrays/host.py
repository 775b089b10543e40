"""What users hand in: NumPy arrays, and what can be seen as such without a copy; CuPy arrays; nested structures of them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ArrayError, StepError
from . import gpu

Array = NDArray[Any]


def _references(arrays: Collection[Array]) -> int:
    """Return the most references that there are to one of `arrays`, those of this function included."""
    return max(sys.getrefcount(array) for array in arrays)


UNHELD = _references([np.empty(0)])  # by nobody but the collection


def held(arrays: Collection[Array]) -> bool:
    """Tell whether anybody holds one of `arrays` besides the collection, be it by a part of it, or as a tensor."""
    return _references(arrays) > UNHELD


def view(value: Any) -> Array:
    """Return `value` (NumPy array, TensorFlow tensor, number) as a NumPy array, without a copy where that is possible."""
    number = isinstance(value, (int, float))  # a mean is no whole number
    return _summable(np.asarray(float(value) if number else value), value)


def _summable(array: Array, value: Any) -> Array:
    if not _is_number(array.dtype):
        raise StepError(
            f"can't sum a value of type {type(value).__name__} (dtype {array.dtype}): give numbers or arrays of them"
        )
    return array


BFLOAT16 = "bfloat16"  # no dtype of NumPy's own: ml_dtypes has it


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether values of `dtype` have a mean of that dtype."""
    return dtype.kind == "f" or dtype.name == BFLOAT16


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iub" or is_float(dtype)


def numbers(value: Any) -> Array:
    """Return `value` as a NumPy array of numbers, or as a CuPy one if it is on a GPU; without a copy where possible."""
    array: Array | None = value if type(value) is np.ndarray else gpu.adopted(value)
    if array is None:
        array = np.asarray(value)
    if array.dtype.kind != "c" and not _is_number(array.dtype):
        raise ArrayError(f"{type(value).__name__} (dtype {array.dtype}): give an array of numbers")
    return array


def name_of(dtype: np.dtype[Any]) -> str:
    """Return what `dtype_named` makes the dtype of, on any rank."""
    return BFLOAT16 if dtype.name == BFLOAT16 else dtype.str


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the dtype with this name."""
    if name == BFLOAT16:
        from ml_dtypes import bfloat16

        name = bfloat16
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


class Structure(NamedTuple):
    """How arrays are nested: `kind` is `HOST`, `GPU`, "list", "tuple" or "dict"; two equal ones nest alike."""

    kind: str
    keys: tuple[Any, ...] = ()
    parts: tuple[Structure, ...] = ()

    def build(self, arrays: Iterator[Any]) -> Any:
        """Return the structure filled with the next of `arrays`."""
        if self.kind in PLACES:
            return next(arrays)
        items = [part.build(arrays) for part in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, items, strict=True))
        return tuple(items) if self.kind == "tuple" else items

    def places(self) -> list[str]:
        """Return where each array is: `HOST` or `GPU`."""
        return [self.kind] if self.kind in PLACES else [place for part in self.parts for place in part.places()]


HOST, GPU = "array", "gpu"
PLACES = frozenset((HOST, GPU))
_on_host, _on_gpu = Structure(HOST), Structure(GPU)


def flatten(tree: Any) -> tuple[list[Array], Structure]:
    """Return the arrays in `tree` (an array, or nested lists, tuples and dicts of them) and how they are nested."""
    if type(tree) is np.ndarray:
        return [_summable(tree, tree)], _on_host
    if isinstance(tree, Mapping):
        arrays, structure = flatten(list(tree.values()))
        return arrays, Structure("dict", tuple(tree), structure.parts)
    if isinstance(tree, (list, tuple)):
        flat = [flatten(item) for item in tree]
        kind = "list" if isinstance(tree, list) else "tuple"
        return [array for arrays, _ in flat for array in arrays], Structure(kind, (), tuple(part for _, part in flat))
    far = gpu.adopted(tree)
    if far is None:
        return [view(tree)], _on_host
    return [_summable(far, tree)], _on_gpu
