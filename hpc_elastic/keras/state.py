"""State of Keras models, optimizers and callbacks: what newcomers receive and checkpoints keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..state import stateful

PLAIN = (bool, int, float, str, type(None))
LONGEST = 63  # bits of an integer that can be sent


class State:
    """State of a Keras model and its optimizer, for `Job.register`.

    Parameters
    ----------
    model : keras.Model
        A built model. Of it are: weights, statistics of batch normalisation, seed generators, and metrics that are built.
    optimizer : keras.Optimizer, optional
        Its optimizer; built here if it is not yet.
    extra : array, dict, or object with ``state()`` and ``load()``, optional
        What belongs to them.
    """

    def __init__(self, model: Any, optimizer: Any = None, extra: Any = None) -> None:
        if not model.built:
            raise ConfigError("he.keras.State needs a built model: give it an Input layer, or call it once")
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        self._variables: list[Any] = [*model.variables, *model.metrics_variables]
        self._variables += optimizer.variables if optimizer is not None else []
        self._extra = stateful("extra", extra) if extra is not None else None

    def state(self) -> dict[str, Any]:
        """Return all variables, in their order, and the state of what is extra."""
        found: dict[str, Any] = {str(index): np.asarray(variable) for index, variable in enumerate(self._variables)}
        return found | prefixed("extra", self._extra.state() if self._extra is not None else {})

    def load(self, state: dict[str, Any]) -> None:
        """Assign all variables.

        Raises
        ------
        ConfigError
            If there are more or fewer than this model has.
        """
        own = {key: value for key, value in state.items() if "." not in key}
        if len(own) != len(self._variables):
            raise ConfigError(f"received {len(own)} variables, but this model and optimizer have {len(self._variables)}")
        for index, variable in enumerate(self._variables):
            variable.assign(own[str(index)])
        if self._extra is not None:
            self._extra.load(below("extra", state))


class Callbacks:
    """What Keras callbacks remember: their attributes that are plain values, arrays, or lists and dicts of these.

    Parameters
    ----------
    callbacks : sequence of keras.callbacks.Callback
        The same ones, in the same order, on every rank.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = callbacks

    def state(self) -> dict[str, Any]:
        """Return the attributes, flat."""
        found: dict[str, Any] = {}
        for number, callback in enumerate(self._callbacks):
            for name, value in vars(callback).items():
                if name not in ("_model", "params"):
                    _flatten(value, f"{number}.{name}", found)
        return found

    def load(self, state: dict[str, Any]) -> None:
        """Put the attributes in place; those that were of another kind stay as they are."""
        for number, callback in enumerate(self._callbacks):
            own = below(str(number), state)
            for name in dict.fromkeys(key.split(".", 1)[0].split(":", 1)[0] for key in own):
                setattr(callback, name, _built(name, own))


def _flatten(value: Any, key: str, found: dict[str, Any]) -> bool:
    """Put `value` into `found` below `key`; False, and nothing is left there, if it is none that can be sent."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, PLAIN) and not (isinstance(value, int) and value.bit_length() > LONGEST):
        found[key] = value
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        found[key] = value.copy()
    elif isinstance(value, list | tuple | dict):
        items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        kind = "list" if not isinstance(value, dict) else "numbers" if value and all(map(_is_number, value)) else "dict"
        inside: dict[str, Any] = {f"{key}:{kind}": len(value)}
        for name, item in items:
            named = kind != "dict" or (isinstance(name, str) and not {".", ":"} & set(name))
            if not named or not _flatten(item, f"{key}.{name}", inside):
                return False
        found |= inside
    else:
        return False
    return True


def _is_number(name: object) -> bool:
    return isinstance(name, int) and not isinstance(name, bool)


def _built(name: str, state: dict[str, Any]) -> Any:
    """Return what `_flatten` took apart below `name`."""
    if name in state:
        value = state[name]
        return value.copy() if isinstance(value, np.ndarray) else value
    inside = below(name, state)
    names = dict.fromkeys(key.split(".", 1)[0].split(":", 1)[0] for key in inside)
    items = {part: _built(part, inside) for part in names}
    if f"{name}:numbers" in state:
        return {int(part): item for part, item in items.items()}
    return items if f"{name}:dict" in state else list(items.values())


def prefixed(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return `state` with all keys below `name`."""
    return {f"{name}.{key}": value for key, value in state.items()}


def below(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return what of `state` is below `name`, without that prefix."""
    return {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name + ".")}
