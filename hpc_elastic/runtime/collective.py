"""Sums, broadcasts and gathers of the user's own arrays, over the ranks that there are now."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..arrays import gpu
from ..arrays.host import Array, dtype_named, name_of, numbers
from ..comm.segments import Bytes
from ..errors import ArrayError, JobError
from ..reduce import Sum

if TYPE_CHECKING:
    from ..comm.world import World
    from .job import Job

SUMS = 8  # of so many shapes and dtypes buffers are kept
_jobs: list[Job] = []  # the one of this process


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What comes with an array."""

    shape: tuple[int, ...]
    dtype: str
    far: bool = False  # on a GPU

    @classmethod
    def of(cls, value: Array) -> bytes:
        """Return that of `value`, for `told`."""
        return msgspec.msgpack.encode(cls(value.shape, name_of(value.dtype), _far(value)))

    @classmethod
    def told(cls, data: bytes) -> Head:
        return msgspec.msgpack.decode(data, type=cls)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_named(self.dtype).itemsize

    def array(self, memory: Bytes) -> Array:
        """Return the array whose bytes are in `memory`."""
        return memory.view(dtype_named(self.dtype)).reshape(self.shape)


class Collective:
    """The collectives of a job.

    Parameters
    ----------
    joined : callable
        Returns the world of now.
    """

    def __init__(self, joined: Callable[[], World]) -> None:
        self._joined = joined
        self._world: World | None = None
        self._sums: dict[object, Sum] = {}  # the one that was used last is the last

    def allreduce(self, array: Any, out: Array | None = None, *, exact: bool = True, wire: str | None = None) -> Array:
        """See the function `allreduce`."""
        world, value = self._joined(), numbers(array)
        if value.dtype.kind == "c":
            raise ArrayError(f"allreduce of {_text(value)}: give the real and the imaginary part, as an array of floats")
        if out is not None and (out.shape, out.dtype, _far(out)) != (value.shape, value.dtype, _far(value)):
            raise ArrayError(f"allreduce of {_text(value)}: out is {_text(out)}, and must be alike")
        if not (exact and world.board.whole) and not world.same(zlib.crc32(f"{_text(value)} {exact} {wire}".encode())):
            raise ArrayError("the ranks did not give arrays alike: shapes and dtypes must be the same on all of them")
        total = self._sum(world, value, exact, wire)
        total.add(world.rank, value, {}, 1.0)
        total.exchange(set())
        result: Array = total.result()[0]
        if out is None:
            return result.copy()
        np.copyto(out, result)
        return out

    def _sum(self, world: World, value: Array, exact: bool, wire: str | None) -> Sum:
        """Return the sum for arrays like `value`, the same one on all ranks."""
        if self._world is not world:
            self._world, self._sums = world, {}
        key = value.shape, value.dtype, type(value), exact, wire
        total = self._sums.pop(key, None) or Sum(world.size, self._joined, exact=exact, wire=wire)
        self._sums[key] = total
        if len(self._sums) > SUMS:
            del self._sums[next(iter(self._sums))]
        return total

    def broadcast(self, array: Any = None, root: int = 0) -> Array:
        """See the function `broadcast`."""
        world = self._joined()
        if not 0 <= root < world.size:
            raise ArrayError(f"broadcast from rank {root}: there are ranks 0 to {world.size - 1}")
        if world.rank == root:
            value = numbers(array)
            near = _near(value)
            world.tell(Head.of(value), root)
            world.fill(near, root)
            return value if _far(value) else near
        head = Head.told(world.tell(None, root))
        value = head.array(np.empty(head.nbytes, np.uint8))
        world.fill(value, root)
        return gpu.to_device(value) if head.far else value

    def allgather(self, array: Any) -> list[Array]:
        """See the function `allgather`."""
        world, value = self._joined(), numbers(array)
        heads = [Head.told(data) for data in world.gather_all(Head.of(value))]
        counts = [head.nbytes for head in heads]
        whole = np.empty(sum(counts), np.uint8)
        world.all_parts(_near(value).reshape(-1).view(np.uint8), whole, counts)
        parts = [head.array(whole[end - head.nbytes : end]) for head, end in zip(heads, accumulate(counts), strict=True)]
        return [gpu.to_device(part) for part in parts] if _far(value) else parts


def _far(value: Array) -> bool:
    """Tell whether `value` is on a GPU."""
    return not isinstance(value, np.ndarray)


def _near(value: Array) -> Array:
    """Return `value` on the host, contiguous."""
    return gpu.to_host(value) if _far(value) else np.ascontiguousarray(value).reshape(value.shape)


def _text(value: Array) -> str:
    return f"{name_of(value.dtype)} {value.shape}" + " on a GPU" * _far(value)


# --- for the job of this process --------------------------------------------------------------------------------------


def serve(job: Job) -> None:
    """Let the functions below work for `job`."""
    _jobs[:] = [job]


def _collective() -> Collective:
    if not _jobs or _jobs[0].over:
        raise JobError("no job is running in this process: call this in the function that is given to he.run")
    return _jobs[0].collective


def allreduce(array: Any, out: Array | None = None, *, exact: bool = True, wire: str | None = None) -> Array:
    """Return the sum of the ranks' arrays, on every rank. Collective.

    The sum has the same bits on every rank, and whenever as many ranks add up the same, on whatever hosts. For the same
    bits at *any* number of ranks use ``step.add``, of which each microbatch is one operand.

    Parameters
    ----------
    array : array_like, bool, integer, float or bfloat16
        Of the same shape and dtype on every rank; NumPy's, or CuPy's (on all ranks then).
    out : numpy.ndarray or cupy.ndarray, optional
        Where the sum goes; it may be `array` itself. Otherwise a new array is made.
    exact : bool
        False takes MPI's own sum, or NCCL's, of which the last bits depend on the library and on where the ranks are.
    wire : "bfloat16" or "float16", optional
        Floating-point arrays are added up with two bytes a value, each rounded to the nearest: see ``job.steps``. On the
        host alone.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        The sum, of the same shape and dtype, where `array` is.

    Raises
    ------
    ArrayError
        If the arrays differ in shape or dtype, or hold something else.
    ConfigError
        If `wire` is something else, or given with ``exact=False``.
    JobError
        If no job is running, or this rank has not joined it yet.
    """
    return _collective().allreduce(array, out, exact=exact, wire=wire)


def broadcast(array: Any = None, root: int = 0) -> Array:
    """Return the array of rank `root`, on every rank. Collective.

    Parameters
    ----------
    array : array_like
        Used on rank `root` alone; of any shape and any dtype of numbers. If it is on a GPU, so is what each rank gets.
    root : int
        The rank whose array is meant.

    Raises
    ------
    ArrayError
        If there is no such rank, or this is the one and gave something else than numbers.
    JobError
        If no job is running, or this rank has not joined it yet.
    """
    return _collective().broadcast(array, root)


def allgather(array: Any) -> list[Array]:
    """Return the arrays of all ranks, in the order of the ranks, on every rank. Collective.

    Parameters
    ----------
    array : array_like
        Of any shape and any dtype of numbers; these may differ from rank to rank. If it is on a GPU, so is all that this
        rank gets.

    Raises
    ------
    ArrayError
        If this rank gave something else than numbers.
    JobError
        If no job is running, or this rank has not joined it yet.
    """
    return _collective().allgather(array)
