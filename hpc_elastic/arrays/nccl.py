"""NCCL, as CuPy has it: messages between the GPUs of ranks. Only `connect` waits for others; all else goes to the stream."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import ArrayError
from . import gpu

Trade = Iterable[tuple[int, gpu.Array]]
OLDEST = 20900  # 2.9, the first that counts its versions so; messages between two ranks are older
# NCCL's names of dtypes, of which it has a sum.
NAMES = {
    "int8": "NCCL_INT8",
    "uint8": "NCCL_UINT8",
    "int32": "NCCL_INT32",
    "uint32": "NCCL_UINT32",
    "int64": "NCCL_INT64",
    "uint64": "NCCL_UINT64",
    "float16": "NCCL_FLOAT16",
    "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
}


def version() -> int:
    """Return NCCL's version, as it numbers them; 0 where it is not there or too old."""
    cupy = gpu.library()
    if cupy is None or not cupy.cuda.nccl.available:
        return 0
    found = int(cupy.cuda.nccl.get_version())
    return found if found >= OLDEST else 0


def fresh_key() -> bytes:
    """Return what all ranks of a new line give to `connect`."""
    return np.array(gpu.library().cuda.nccl.get_unique_id(), np.int8).tobytes()


class Line:
    """A communicator of NCCL's, over the current GPU of each rank.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
        NCCL's.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._nccl = gpu.library().cuda.nccl

    def trade(self, sends: Trade, receives: Trade) -> None:
        """Begin to send arrays to ranks, and to receive others; what two trade comes in the order in which it is named."""
        stream = gpu.library().cuda.get_current_stream().ptr
        self._nccl.groupStart()
        try:
            for rank, array in sends:
                if array.nbytes:
                    self._comm.send(array.data.ptr, array.nbytes, self._nccl.NCCL_UINT8, rank, stream)
            for rank, array in receives:
                if array.nbytes:
                    self._comm.recv(array.data.ptr, array.nbytes, self._nccl.NCCL_UINT8, rank, stream)
        finally:
            self._nccl.groupEnd()

    def add_up(self, array: gpu.Array) -> None:
        """Begin to add up the ranks' flat `array` in place, in whatever order."""
        stream = gpu.library().cuda.get_current_stream().ptr
        self._comm.allReduce(array.data.ptr, array.data.ptr, array.size, kind(array.dtype), self._nccl.NCCL_SUM, stream)

    def check(self) -> None:
        """Raise what NCCL has noticed since."""
        self._comm.check_async_error()

    def close(self) -> None:
        """End it, whatever the others do. What is under way is ended with it."""
        self._comm.abort()


def kind(dtype: np.dtype[Any]) -> int:
    """Return NCCL's number of a dtype.

    Raises
    ------
    ArrayError
        If NCCL has no sum of it.
    """
    if dtype.name not in NAMES:
        raise ArrayError(f"NCCL has no sum of {dtype}: leave exact=True")
    number: int = getattr(gpu.library().cuda.nccl, NAMES[dtype.name])
    return number


def error() -> type[Exception]:
    """Return the class of NCCL's errors."""
    found: type[Exception] = gpu.library().cuda.nccl.NcclError
    return found


def connect(key: bytes, size: int, rank: int, device: int) -> Line:
    """Return this rank's end of a new line. Collective, and to be called in a thread: NCCL waits for all ranks, for ever.

    Every two ranks trade a byte here, since NCCL makes a connection when it is first used, and waits then.
    """
    os.environ.setdefault("NCCL_RUNTIME_CONNECT", "0")  # nor are connections for its own sums to be made later
    cupy = gpu.library()
    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        line = Line(cupy.cuda.nccl.NcclCommunicator(size, tuple(np.frombuffer(key, np.int8).tolist()), rank))
        bytes_ = gpu.empty(2 * size)
        bytes_.fill(0)
        others = [other for other in range(size) if other != rank]
        line.trade(
            [(other, bytes_[other : other + 1]) for other in others],
            [(other, bytes_[size + other : size + other + 1]) for other in others],
        )
        stream.synchronize()
    return line
