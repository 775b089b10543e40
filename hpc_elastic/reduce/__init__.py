"""The canonical sum: the same bits at any number of ranks. The order is in `order`, the transport here is plain MPI."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays.host import Structure, flatten
from ..errors import StepError
from ..partition import block
from .order import Node, TreeSum, present, roots

Array = NDArray[Any]
SMALL_BYTES = 1 << 15  # up to here everybody gets all partial sums and adds them up; above, each rank adds up one slice


class Ranks(Protocol):
    """The ranks that take part."""

    rank: int
    size: int

    def all_parts(self, mine: Array, out: Array, counts: Sequence[int]) -> None: ...

    def swap_parts(self, mine: Array, counts: Sequence[int], out: Array, out_counts: Sequence[int]) -> None: ...

    def meet(self, nbytes: int) -> None: ...


class Form:
    """How a structure of arrays lies in one flat buffer a dtype; metrics lie behind the float64 ones."""

    def __init__(
        self, structure: Structure, arrays: tuple[tuple[tuple[int, ...], str], ...], metrics: tuple[str, ...]
    ) -> None:
        self.key = structure, arrays, metrics
        self.structure = structure
        self.metrics = metrics
        self.places: list[tuple[str, slice, tuple[int, ...]]] = []
        self.lengths: dict[str, int] = {}
        for shape, dtype in (*arrays, ((len(metrics),), np.dtype(np.float64).str)):
            start = self.lengths.get(dtype, 0)
            self.lengths[dtype] = start + math.prod(shape)
            self.places.append((dtype, slice(start, self.lengths[dtype]), shape))

    def new(self) -> dict[str, Array]:
        """Return buffers for one set of values."""
        return {dtype: np.empty(length, dtype) for dtype, length in self.lengths.items()}


Values = dict[str, Array]


class Sum:
    """Sums what the microbatches of a step contribute.

    Parameters
    ----------
    leaves : int
        Number L of microbatches.
    ranks : callable
        Returns the ranks of the current generation.
    """

    def __init__(self, leaves: int, ranks: Callable[[], Ranks]) -> None:
        self._leaves = leaves
        self._ranks = ranks
        self._form: Form | None = None
        self._spare: list[Values] = []
        self._result: Values | None = None
        self._total: Values | None = None
        self._tree: TreeSum[Values] | None = None

    @property
    def interval(self) -> tuple[int, int]:
        """The microbatches of this rank."""
        ranks = self._ranks()
        return block(self._leaves, ranks.size, ranks.rank)

    def _combine(self, left: Values, right: Values) -> Values:
        for dtype, values in left.items():
            np.add(values, right[dtype], out=values)
        self._spare.append(right)
        return left

    def add(self, index: int, values: Any, metrics: dict[str, float], weight: float) -> None:
        """Contribute microbatch `index`: floating-point values are multiplied by `weight`, integers are not."""
        arrays, structure = flatten(values)
        key = structure, tuple((a.shape, a.dtype.str) for a in arrays), tuple(metrics)
        if self._form is None:
            self._form = Form(*key)
        form = self._form
        if key != form.key:
            raise StepError(
                f"step.add got {len(arrays)} arrays and metrics {list(metrics)}, unlike the first time "
                f"({len(form.key[1])} arrays, metrics {list(form.metrics)}): "
                "nesting, keys and their order, shapes and dtypes must stay the same"
            )
        own = self._spare.pop() if self._spare else form.new()
        for array, (dtype, place, shape) in zip((*arrays, np.array(list(metrics.values()))), form.places, strict=True):
            target = own[dtype][place].reshape(shape)
            if array.dtype.kind == "f":
                np.multiply(array, array.dtype.type(weight), out=target)
            else:
                np.copyto(target, array)
        if self._tree is None:
            self._tree = TreeSum(self._combine, self.interval[0])
        self._tree.feed(Node(0, index), own)

    def drop(self) -> None:
        """Forget what was added since the last sum."""
        self._tree = None

    def exchange(self, empty: set[int]) -> None:
        """Add up over all ranks; `empty` leaves had no samples. Collective."""
        ranks = self._ranks()
        there = [
            present(roots(*block(self._leaves, ranks.size, rank), self._leaves), empty, self._leaves)
            for rank in range(ranks.size)
        ]
        if self._form is None and there[ranks.rank]:
            raise StepError("step.reduce without any step.add")
        form = self._agreed(ranks, there)
        mine = self._tree.subtrees(there[ranks.rank]) if self._tree is not None else []
        self._tree = None
        if ranks.size == 1:
            (result,) = mine
            if self._result is not None:
                self._spare.append(self._result)
            self._result = result
        else:
            result = {
                dtype: self._across(ranks, there, [value[dtype] for value in mine], length, np.dtype(dtype))
                for dtype, length in form.lengths.items()
            }
            self._result = None  # it is not one of the buffers, which are all spare again
            self._spare += mine
        self._total = result

    def reduce(self, empty: set[int]) -> tuple[Any, dict[str, float]]:
        """Return the result of an `exchange`. Collective."""
        self.exchange(empty)
        return self.result()

    def result(self) -> tuple[Any, dict[str, float]]:
        """Return the sums in the structure of what was added, and the metrics. Valid until the next `exchange`."""
        form, total = self._form, self._total
        assert form is not None
        assert total is not None
        arrays = [total[dtype][place].reshape(shape) for dtype, place, shape in form.places]
        return form.structure.build(iter(arrays)), dict(zip(form.metrics, arrays[-1].tolist(), strict=True))

    def _agreed(self, ranks: Ranks, there: list[list[Node]]) -> Form:
        """Return the form. A newcomer that has no share of its first step, a small last batch, gets it from the others."""
        if not all(there):
            source = next(rank for rank, nodes in enumerate(there) if nodes)
            told = pickle.dumps(self._form.key) if self._form is not None and ranks.rank == source else b""
            counts = np.empty(ranks.size, np.int64)
            ranks.all_parts(np.array([len(told)]), counts, [1] * ranks.size)
            whole = np.empty(int(counts.sum()), np.uint8)
            ranks.all_parts(np.frombuffer(told, np.uint8), whole, counts.tolist())
            if self._form is None:
                self._form = Form(*pickle.loads(whole.tobytes()))  # noqa: S301  from a rank of this very job
        assert self._form is not None
        return self._form

    def _across(self, ranks: Ranks, there: list[list[Node]], mine: list[Array], length: int, dtype: np.dtype[Any]) -> Array:
        """Sum over all ranks, for one dtype; `there` are the partial sums that every rank has."""
        if not length:
            return np.empty(0, dtype)
        most = max(len(nodes) for nodes in there)
        together = most * length * dtype.itemsize <= SMALL_BYTES
        cuts = [(0, length)] * ranks.size if together else [block(length, ranks.size, rank) for rank in range(ranks.size)]
        low, high = cuts[ranks.rank]
        counts = [len(nodes) * (high - low) for nodes in there]
        parts = np.empty(sum(counts), dtype)
        if together:
            ranks.all_parts(_joined(mine, dtype), parts, counts)
        else:
            ranks.meet(length * dtype.itemsize)
            pieces = [values[start:stop] for start, stop in cuts for values in mine]
            ranks.swap_parts(_joined(pieces, dtype), [len(mine) * (stop - start) for start, stop in cuts], parts, counts)
        tree: TreeSum[Array] = TreeSum(lambda left, right: np.add(left, right, out=left))
        rows = iter(parts.reshape(-1, high - low) if high > low else [parts] * sum(map(len, there)))
        for nodes in there:
            for node in nodes:
                tree.feed(node, next(rows))
        total = tree.total()
        if together:
            return total
        whole = np.empty(length, dtype)
        ranks.all_parts(np.ascontiguousarray(total), whole, [stop - start for start, stop in cuts])
        return whole


def _joined(parts: list[Array], dtype: np.dtype[Any]) -> Array:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
