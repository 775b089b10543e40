"""Registered state: what a newcomer receives, packed so that no array is pickled and large ones are not copied."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
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
        """Copy the array received over the own one.

        Raises
        ------
        ConfigError
            If it is of another shape or dtype.
        """
        other = state["array"]
        if (other.shape, other.dtype) != (self._array.shape, self._array.dtype):
            raise ConfigError(
                f"received an array {other.shape} {other.dtype}, but {self._array.shape} {self._array.dtype} is registered "
                "here: newcomers must register arrays like those of the members"
            )
        np.copyto(self._array, other)


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
            if not isinstance(value, np.ndarray):
                self._values[key] = value
            elif isinstance(own, np.ndarray) and (own.shape, own.dtype) == (value.shape, value.dtype):
                np.copyto(own, value)
            else:
                self._values[key] = value.copy()


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

    def pack(self) -> tuple[bytes, list[Array]]:
        """Return all states as a header and the arrays it tells of, which are not copied where they are contiguous."""
        entries: list[Entry] = []
        arrays: list[Array] = []
        for owner, thing in self._owners.items():
            for key, value in thing.state().items():
                if isinstance(value, np.ndarray):
                    if value.dtype.hasobject or np.dtype(value.dtype.str) != value.dtype:
                        raise ConfigError(
                            f"register({owner}=…): {key!r} is an array of {value.dtype}, which can't be sent to newcomers: "
                            "give arrays of plain numbers or texts, one for each field"
                        )
                    arrays.append(np.ascontiguousarray(value).reshape(value.shape))
                    entries.append(Entry(owner, key, value.dtype.str, value.shape))
                else:
                    entries.append(Entry(owner, key, value=value))
        return _encoded(self.names(), entries), arrays

    def unpack(self, header: bytes, arrays: Sequence[Array]) -> None:
        """Load what `pack` returned, there or elsewhere.

        Raises
        ------
        MembershipError
            If other names were packed than are registered here.
        """
        states: dict[str, dict[str, Any]] = {name: {} for name in self._owners}
        rest = iter(arrays)
        for entry in self._entries(header):
            states[entry.owner][entry.key] = next(rest) if entry.dtype else entry.value
        for name, thing in self._owners.items():
            thing.load(states[name])

    def _entries(self, header: bytes) -> list[Entry]:
        names, entries = msgspec.msgpack.decode(header, type=tuple[list[str], list[Entry]])
        if set(names) != set(self._owners):
            theirs, ours = ", ".join(names) or "nothing", ", ".join(self._owners) or "nothing"
            raise MembershipError(f"received the state of {theirs}, but this rank registered {ours}")
        return entries

    def send(self, channel: Channel) -> int:
        """Send all states to the other ranks of `channel`; return the number of bytes. Collective with `receive`."""
        header, arrays = self.pack()
        channel.tell(header)
        small = [_bytes(array) for array in arrays if array.nbytes < SMALL_BYTES]
        packed = np.concatenate(small) if small else np.empty(0, np.uint8)
        if packed.nbytes:
            channel.fill(packed)
        for array in arrays:
            if array.nbytes >= SMALL_BYTES:
                channel.fill(array.reshape(-1))
        return len(header) + sum(array.nbytes for array in arrays)

    def receive(self, channel: Channel) -> None:
        """Receive all states and load them."""
        header = channel.tell(None)
        entries = [entry for entry in self._entries(header) if entry.dtype]
        packed = np.empty(sum(e.nbytes for e in entries if e.nbytes < SMALL_BYTES), np.uint8)
        if packed.nbytes:
            channel.fill(packed)
        arrays: list[Array] = []
        offset = 0
        for entry in entries:
            if entry.nbytes < SMALL_BYTES:
                value: Array = packed[offset : offset + entry.nbytes].view(entry.dtype).reshape(entry.shape)
                offset += entry.nbytes
            else:
                value = np.empty(entry.shape, entry.dtype)
                channel.fill(value.reshape(-1))
            arrays.append(value)
        self.unpack(header, arrays)


def _encoded(names: list[str], entries: list[Entry]) -> bytes:
    try:
        return msgspec.msgpack.encode((names, entries))
    except (TypeError, ValueError, OverflowError):
        for entry in entries:
            try:
                msgspec.msgpack.encode(entry)
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"register({entry.owner}=…): {entry.key!r} can't be sent to newcomers ({error}): "
                    "give NumPy arrays, None, bool, int, float or str"
                ) from error
        raise


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
