"""GPU arrays: the one module that imports CuPy, and does so only where a value lies on a GPU.

CuPy's arrays are computed with by NumPy's functions, which hand them over to CuPy (NEP 13 and 18). All work goes to CuPy's
current stream, and `wait` comes before anybody else reads.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArrayError, ConfigError

Array = Any  # CuPy's have no type that a host without CuPy knows
Bytes = NDArray[np.uint8]
ON_CUDA = (2, 13)  # as DLPack numbers its kinds of devices: CUDA's memory, and CUDA's managed memory
PRESENT = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg"))  # noqa: PTH110  (a driver, on Linux or WSL)
PINNED_BYTES = 1 << 20  # pinning takes longer than copying less than this


@cache
def library() -> Any:
    """Return CuPy, or None where it is not installed or sees no GPU."""
    if not PRESENT:
        return None
    try:
        import cupy
    except ImportError:
        return None
    return cupy if cupy.cuda.is_available() else None


def pick(local_rank: int, environ: Mapping[str, str], count: int) -> int:
    """Return which of `count` visible GPUs a rank takes. Pure.

    Parameters
    ----------
    local_rank : int
        Number of the rank, or of its slot, on its host.
    environ : mapping of str to str
        The environment, for what the error says.

    Raises
    ------
    ConfigError
        If none is visible.
    """
    if count > 0:
        return local_rank % count  # where Slurm has given each rank one of its own, that is the only one
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        why = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it, or name a GPU that is there"
    elif "SLURM_JOB_ID" in environ:
        why = "ask Slurm for one (--gres=gpu:1), or give NumPy arrays"
    else:
        why = "install CuPy (the extra gpu) where nvidia-smi shows one, or give NumPy arrays"
    raise ConfigError(f"no GPU is visible to this rank: {why}")


def use(local_rank: int) -> int:
    """Make this rank's GPU the current one, and return its number; see `pick`."""
    cupy = library()
    number = pick(local_rank, os.environ, cupy.cuda.runtime.getDeviceCount() if cupy is not None else 0)
    cupy.cuda.Device(number).use()
    return number


def adopted(value: Any) -> Array | None:
    """Return `value` as a CuPy array, without a copy, if it lies on a GPU; else None.

    Raises
    ------
    ArrayError
        If it is on another GPU than the current one.
    """
    if not PRESENT or not hasattr(value, "__dlpack_device__"):
        return None
    kind, number = value.__dlpack_device__()
    if kind not in ON_CUDA or (cupy := library()) is None:
        return None
    here = cupy.cuda.Device().id
    if number != here:
        raise ArrayError(
            f"an array is on GPU {number}, and this rank computes on GPU {here}: a rank uses one GPU; "
            "call job.gpu() before you make arrays, or let CUDA_VISIBLE_DEVICES name one GPU for each rank"
        )
    if isinstance(value, cupy.ndarray):
        return value
    settle()  # TensorFlow says nothing of its streams, and takes none
    return cupy.from_dlpack(_Lent(value))


class _Lent:
    """What CuPy takes over from another library. It asks for a stream, which TensorFlow refuses."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._value.__dlpack_device__()
        return device

    def __dlpack__(self, **_: Any) -> object:
        capsule: object = self._value.__dlpack__()
        return capsule


def lend(array: Array) -> object:
    """Return the DLPack capsule of a CuPy array, when it has been computed."""
    wait()
    capsule: object = array.__dlpack__()
    return capsule


# --- memory and copies ------------------------------------------------------------------------------------------------


def empty(nbytes: int) -> Array:
    """Return `nbytes` bytes of memory on the current GPU.

    Raises
    ------
    ConfigError
        If this rank has none.
    """
    cupy = library()
    if cupy is None:
        pick(0, os.environ, 0)
    return cupy.empty(nbytes, np.uint8)


def fetch(source: Array, target: NDArray[Any]) -> None:
    """Begin to copy from the GPU to the host; `wait` ends it."""
    if target.nbytes:
        source.get(out=target, blocking=False)


def put(source: NDArray[Any], target: Array) -> None:
    """Begin to copy from the host to the GPU; `wait` ends it."""
    if source.nbytes:
        target.set(source)


def wait() -> None:
    """Return when all work on the current stream has been done."""
    library().cuda.get_current_stream().synchronize()


def settle() -> None:
    """Return when all work on the current GPU has been done, of whatever library in this process."""
    library().cuda.Device().synchronize()


def finished() -> Callable[[], bool]:
    """Return what tells, without waiting, whether all work on the current stream so far has been done."""
    event = library().cuda.get_current_stream().record()
    return lambda: bool(event.done)


def to_host(array: Array) -> NDArray[Any]:
    """Return a copy on the host."""
    copy: NDArray[Any] = array.get()
    return copy


def to_device(array: NDArray[Any]) -> Array:
    """Return a copy on the current GPU."""
    target = empty(array.nbytes).view(array.dtype).reshape(array.shape)
    put(array, target)
    wait()
    return target


def name() -> str:
    """Return what the current GPU is called on its host; empty without one."""
    cupy = library()
    return str(cupy.cuda.Device().pci_bus_id) if cupy is not None else ""


def current() -> int:
    """Return the number of the current GPU."""
    return int(library().cuda.Device().id)


# --- pinned memory ----------------------------------------------------------------------------------------------------

_pinned: set[int] = set()  # addresses


def pin(memory: Bytes) -> None:
    """Pin host memory, once, until it is unmapped: the GPU copies from and to it by itself then.

    Where the system does not let it, copies take longer; nothing else changes.
    """
    address = memory.ctypes.data
    if memory.nbytes < PINNED_BYTES or address in _pinned:
        return
    runtime = library().cuda.runtime
    try:
        runtime.hostRegister(address, memory.nbytes, 0)
    except runtime.CUDARuntimeError:
        return
    _pinned.add(address)
    # The array that holds the mapping: all views of it go before it does, and it goes before its memory.
    owner = memory.base if isinstance(memory.base, np.ndarray) else memory
    weakref.finalize(owner, _unpin, address).atexit = False  # at the end the driver may be gone already


def _unpin(address: int) -> None:
    _pinned.discard(address)
    library().cuda.runtime.hostUnregister(address)
