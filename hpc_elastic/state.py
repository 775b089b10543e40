"""Registered state: what a newcomer receives, packed so that no array is pickled and large ones are not copied."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, MembershipError
from .protocols import Stateful

Array = NDArray[Any]
SMALL_BYTES = 1 << 16  # arrays below this travel together


class Channel(Protocol):
    """What carries a state: the first rank's bytes and arrays reach all others."""

    rank: int

    def tell(self, data: bytes | None) -> bytes: ...

    def fill(self, array: Array) -> None: ...


class Entry(msgspec.Struct, frozen=True):
    """One item of a state: an array's form, or a plain value."""

    owner: str
    key: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    value: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64)) if self.dtype else 0


class ArrayState:
    """State of one NumPy array, changed in place."""

    def __init__(self, array: Array) -> None:
        self._array = array

    def state(self) -> dict[str, Any]:
        """Return the array."""
        return {"array": self._array}

    def load(self, state: dict[str, Any]) -> None:
        """Copy the array received over the own one."""
        np.copyto(self._array, state["array"])


class DictState:
    """State of a dict of arrays and plain values; arrays of the same form are changed in place."""

    def __init__(self, values: MutableMapping[str, Any]) -> None:
        self._values = values

    def state(self) -> dict[str, Any]:
        """Return the items."""
        return dict(self._values)

    def load(self, state: dict[str, Any]) -> None:
        """Take the items received."""
        for key, value in state.items():
            own = self._values.get(key)
            if isinstance(own, np.ndarray) and isinstance(value, np.ndarray) and own.shape == value.shape:
                np.copyto(own, value)
            else:
                self._values[key] = value.copy() if isinstance(value, np.ndarray) else value


def stateful(name: str, value: Any) -> Stateful:
    """Return `value` as something with a state.

    Raises
    ------
    ConfigError
        If it is neither `Stateful`, nor a NumPy array, nor a dict.
    """
    if isinstance(value, np.ndarray):
        return ArrayState(value)
    if isinstance(value, MutableMapping):
        return DictState(value)
    if isinstance(value, Stateful):
        return value
    raise ConfigError(
        f"register({name}=…): a {type(value).__name__} has no state; give a NumPy array, a dict, "
        "hpc_elastic.keras.State(model), or an object with state() and load()"
    )


class Registry:
    """All that was registered, by name."""

    def __init__(self) -> None:
        self._owners: dict[str, Stateful] = {}

    def add(self, owners: Mapping[str, Any]) -> None:
        """Register what `owners` holds; a name can be taken once."""
        for name, value in owners.items():
            if name in self._owners:
                raise ConfigError(f"register({name}=…): the name is taken")
            self._owners[name] = stateful(name, value)

    def names(self) -> list[str]:
        """Names registered, in order."""
        return list(self._owners)

    def send(self, channel: Channel) -> int:
        """Send all states to the other ranks of `channel`; return the number of bytes. Collective with `receive`."""
        entries: list[Entry] = []
        arrays: list[Array] = []
        for owner, thing in self._owners.items():
            for key, value in thing.state().items():
                if isinstance(value, np.ndarray):
                    arrays.append(np.ascontiguousarray(value))
                    entries.append(Entry(owner, key, value.dtype.str, value.shape))
                else:
                    entries.append(Entry(owner, key, value=value))
        header = msgspec.msgpack.encode(entries)
        channel.tell(header)
        small = [_bytes(array) for array in arrays if array.nbytes < SMALL_BYTES]
        packed = np.concatenate(small) if small else np.empty(0, np.uint8)
        if packed.nbytes:
            channel.fill(packed)
        for array in arrays:
            if array.nbytes >= SMALL_BYTES:
                channel.fill(array)
        return len(header) + sum(array.nbytes for array in arrays)

    def receive(self, channel: Channel) -> None:
        """Receive all states and load them."""
        entries = msgspec.msgpack.decode(channel.tell(None), type=list[Entry])
        packed = np.empty(sum(e.nbytes for e in entries if e.nbytes < SMALL_BYTES), np.uint8)
        if packed.nbytes:
            channel.fill(packed)
        states: dict[str, dict[str, Any]] = {name: {} for name in self._owners}
        offset = 0
        for entry in entries:
            value = entry.value
            if entry.dtype and entry.nbytes < SMALL_BYTES:
                value = packed[offset : offset + entry.nbytes].view(entry.dtype).reshape(entry.shape)
                offset += entry.nbytes
            elif entry.dtype:
                value = np.empty(entry.shape, entry.dtype)
                channel.fill(value)
            if entry.owner not in states:
                raise MembershipError(f"received the state of {entry.owner!r}, which this rank did not register")
            states[entry.owner][entry.key] = value
        for name, thing in self._owners.items():
            thing.load(states[name])


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
