"""The canonical sum: the same bits at any number of ranks. Order: `order`; transports: `node`, `network`, `device`."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..arrays.host import GPU, Array, Structure, flatten, is_float, name_of
from ..comm.board import Board
from ..errors import ArrayError, ConfigError, StepError
from ..partition import block
from .form import DType, Form, Pool
from .half import kept_as, wire_of
from .library import Library, Reducing
from .network import Messages, Network
from .node import OneHost, Transport
from .order import There, shares
from .part import Part

if TYPE_CHECKING:
    from ..comm.waiting import Watch
    from ..comm.world import Belonging

SMALL_BYTES = 1 << 15  # up to here every rank adds up all for itself; above, each adds up one slice


class Ranks(Messages, Reducing, Protocol):
    """The ranks that take part."""

    size: int
    watch: Watch

    @property
    def board(self) -> Board: ...

    def gather_all(self, data: bytes) -> list[bytes]: ...

    def keep(self, name: str, make: Callable[[], Belonging]) -> Belonging: ...


# How arrays nest, their forms, the names of metrics, and how many arrays, the last ones, are summed and not averaged.
Key = tuple[Structure, tuple[tuple[tuple[int, ...], DType], ...], tuple[str, ...], int]


class Sum:
    """Sums what the microbatches of a step contribute.

    Parameters
    ----------
    leaves : int
        Number L of microbatches.
    ranks : callable
        Returns the ranks of the current generation.
    exact : bool
        False takes MPI's own sum, in whatever order.
    wire : str, optional
        Name of the precision to which wider floating-point values are rounded: see `half`.
    """

    def __init__(self, leaves: int, ranks: Callable[[], Ranks], *, exact: bool = True, wire: str | None = None) -> None:
        if wire is not None and not exact:
            raise ConfigError("wire needs exact=True: MPI adds up in the arrays' own precision")
        self._wire = wire_of(wire)
        self._exact = exact
        self._leaves = leaves
        self._ranks = ranks
        self._key: Key | None = None
        self._parts: list[Part] = []
        self._added = False  # since the last sum that was done
        self._among: Ranks | None = None  # whom the interval is of
        self._interval = (0, 0)

    @property
    def interval(self) -> tuple[int, int]:
        """The microbatches of this rank."""
        ranks = self._ranks()
        if ranks is not self._among:
            self._among, self._interval = ranks, block(self._leaves, ranks.size, ranks.rank)
        return self._interval

    def add(self, index: int, values: Any, metrics: dict[str, float], weight: float, sums: Any = None) -> None:
        """Contribute microbatch `index`: floating-point `values` are multiplied by `weight`, integers and `sums` are not."""
        arrays, structure = flatten(values)
        weights = [weight if is_float(array.dtype) else None for array in arrays]
        more: list[Array] = []
        if sums is not None:
            more, theirs = flatten(sums)
            arrays, structure = arrays + more, Structure("tuple", (), (structure, theirs))
            weights += [None] * len(more)
        key = structure, tuple((a.shape, a.dtype) for a in arrays), tuple(metrics), len(more)
        if self._key is None:
            self._begin(key)
        elif key != self._key:
            _, forms, names, _ = self._key
            raise StepError(
                f"step.add got {len(arrays)} arrays and metrics {list(metrics)}, unlike the first time "
                f"({len(forms)} arrays, metrics {list(names)}): "
                "nesting, keys and their order, shapes and dtypes, and whether on a GPU, must stay the same"
            )
        if metrics or len(self._parts) > 1:
            arrays.append(np.array(list(metrics.values())))
            weights.append(weight)
        for part in self._parts:
            part.add(index, arrays, weights)
        self._added = True

    def _begin(self, key: Key) -> None:
        """Lay out the arrays, and behind them the metrics, in parts: what is on the host, and what is on the GPU."""
        structure, arrays, metrics, summed = key
        given = [*arrays, ((len(metrics),), np.dtype(np.float64))]
        means = len(arrays) - summed
        forms = [*((shape, kept_as(dtype, self._wire)) for shape, dtype in arrays[:means]), *given[means:]]
        places = structure.places()
        named = ((shape, name_of(dtype), place) for (shape, dtype), place in zip(arrays, places, strict=True))
        told = [*named, *metrics, self._wire]
        digest = zlib.crc32(repr(told).encode())
        far = [number for number, place in enumerate(places) if place == GPU]
        near = [number for number in range(len(forms)) if number not in far] if far else None
        # The host's part is always there, and comes first: where it meets, ranks whose forms differ are told.
        own = forms if near is None else [forms[number] for number in near]
        self._parts = [Part(Pool(Form(own, digest, given if near is None else None)), near, self._first, self._by_host)]
        if far and self._wire is not None:
            raise ArrayError("wire is for arrays on the host, and some of these are on the GPU: leave wire out")
        if far:
            from .device import GpuSlots

            slots = GpuSlots(Form([forms[number] for number in far], digest))
            self._parts.append(Part(slots, far, self._first, self._by_device))
        self._key = key

    def _first(self) -> int:
        return self.interval[0]

    def drop(self) -> None:
        """Forget what was added since the last sum."""
        for part in self._parts:
            part.drop(added=self._added)
        self._added = False

    def exchange(self, empty: AbstractSet[int]) -> None:
        """Add up over all ranks; `empty` leaves had no samples. Collective."""
        ranks = self._ranks()
        there = shares(self._leaves, ranks.size, frozenset(empty))
        if self._key is None and there[ranks.rank]:
            raise StepError("step.reduce without any step.add")
        self._agree(ranks, there)
        try:
            for part in self._parts:
                part.exchange(ranks, there, large=ranks.size > 1 and (not self._exact or part.form.nbytes > SMALL_BYTES))
        except BaseException:
            self.drop()  # what the parts after that one still have
            raise
        self._added = False

    def _by_host(self, ranks: Ranks) -> Transport[Pool]:
        if not self._exact:
            return Library(ranks)
        board = ranks.board
        return OneHost(board) if len(board.hosts) == 1 else Network(board, ranks)

    def _by_device(self, ranks: Ranks) -> Transport[Any]:
        from .device import way

        return way(ranks, self._by_host(ranks), exact=self._exact)

    def reduce(self, empty: AbstractSet[int]) -> tuple[Any, dict[str, float]]:
        """Return the result of an `exchange`. Collective."""
        self.exchange(empty)
        return self.result()

    def result(self) -> tuple[Any, dict[str, float]]:
        """Return the sums in the structure of what was added, and the metrics.

        They are valid until the next exchange, and read-only on the host.
        """
        assert self._key is not None
        structure, _, metrics, _ = self._key
        results = self._parts[0].results if len(self._parts) == 1 else _woven(self._parts)
        return structure.build(iter(results)), dict(zip(metrics, results[-1].tolist(), strict=True)) if metrics else {}

    def _agree(self, ranks: Ranks, there: There) -> None:
        """Know the form. A newcomer that has no share of its first step, a small last batch, gets it from the others."""
        if all(there):
            return
        source = next(rank for rank, nodes in enumerate(there) if nodes)
        heard = ranks.gather_all(pickle.dumps(self._key) if ranks.rank == source else b"")[source]
        if self._key is None:
            self._begin(pickle.loads(heard))  # noqa: S301  from a rank of this very job


def _woven(parts: Sequence[Part]) -> list[Any]:
    """Return the results of all `parts` in the order of the arrays."""
    numbered = {number: array for part in parts for number, array in zip(part.numbers or (), part.results, strict=True)}
    return [numbered[number] for number in range(len(numbered))]
