"""The canonical sum: the same bits at any number of ranks. Its order is in `order`, transports in `node` and `network`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..arrays.host import flatten, is_float
from ..comm.board import Board
from ..errors import ConfigError, StepError
from ..partition import block
from .form import Form, Pool, Slot
from .half import plus, store, wire_of
from .library import Library, Reducing
from .network import Messages, Network
from .node import OneHost, Transport
from .order import Node, There, TreeSum, shares

SMALL_BYTES = 1 << 15  # up to here every rank adds up all for itself; above, each adds up one slice


class Ranks(Messages, Reducing, Protocol):
    """The ranks that take part."""

    size: int

    @property
    def board(self) -> Board: ...

    def gather_all(self, data: bytes) -> list[bytes]: ...


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
        self._form: Form | None = None
        self._pool: Pool | None = None
        self._tree: TreeSum[Slot] | None = None
        self._added = False  # since the last sum that was done
        self._held: list[Slot] = []  # of the last sum, which others may still read, or which is its result
        self._total: Slot | None = None
        self._transport: Transport | None = None
        self._among: Ranks | None = None  # whom the transport is for

    @property
    def interval(self) -> tuple[int, int]:
        """The microbatches of this rank."""
        ranks = self._ranks()
        return block(self._leaves, ranks.size, ranks.rank)

    def _combine(self, left: Slot, right: Slot) -> Slot:
        for dtype, values in left.flat.items():
            plus(values, right.flat[dtype], values)
        self._slots.give([right])
        return left

    @property
    def _slots(self) -> Pool:
        if self._pool is None:
            assert self._form is not None
            self._pool = Pool(self._form)
        return self._pool

    def add(self, index: int, values: Any, metrics: dict[str, float], weight: float) -> None:
        """Contribute microbatch `index`: floating-point values are multiplied by `weight`, integers are not."""
        arrays, structure = flatten(values)
        key = structure, tuple((a.shape, a.dtype) for a in arrays), tuple(metrics)
        if self._form is None:
            self._form = Form(*key, self._wire)
        form = self._form
        if key != form.key:
            raise StepError(
                f"step.add got {len(arrays)} arrays and metrics {list(metrics)}, unlike the first time "
                f"({len(form.key[1])} arrays, metrics {list(form.metrics)}): "
                "nesting, keys and their order, shapes and dtypes must stay the same"
            )
        slot = self._slots.take()
        for array, target in zip((*arrays, np.array(list(metrics.values()))), slot.arrays, strict=True):
            store(array, weight if is_float(array.dtype) else None, target)
        if self._tree is None:
            self._tree = TreeSum(self._combine, self.interval[0])
        self._tree.feed(Node(0, index), slot)
        self._added = True

    def drop(self) -> None:
        """Forget what was added since the last sum."""
        if self._added and self._pool is not None:
            self._pool.recall(self._held)
        self._tree, self._added = None, False

    def exchange(self, empty: set[int]) -> None:
        """Add up over all ranks; `empty` leaves had no samples. Collective."""
        ranks = self._ranks()
        there = shares(self._leaves, ranks.size, frozenset(empty))
        if self._form is None and there[ranks.rank]:
            raise StepError("step.reduce without any step.add")
        form = self._agreed(ranks, there)
        mine = self._tree.subtrees(there[ranks.rank]) if self._tree is not None else []
        self._tree = None
        slots = self._slots
        large = ranks.size > 1 and (not self._exact or form.nbytes > SMALL_BYTES)
        if ranks.size == 1:
            self._total = mine[0]
        elif large:
            self._total = self._across(ranks).large(form, slots, mine, there)
        else:
            self._total = self._across(ranks).small(form, slots, mine, there)
        done, self._held = (self._held + mine, []) if large else (self._held, mine)
        slots.give(done)
        self._added = False

    def _across(self, ranks: Ranks) -> Transport:
        if self._transport is None or self._among is not ranks:
            self._transport, self._among = self._way(ranks), ranks
        return self._transport

    def _way(self, ranks: Ranks) -> Transport:
        if not self._exact:
            return Library(ranks)
        board = ranks.board
        return OneHost(board) if len(board.hosts) == 1 else Network(board, ranks)

    def reduce(self, empty: set[int]) -> tuple[Any, dict[str, float]]:
        """Return the result of an `exchange`. Collective."""
        self.exchange(empty)
        return self.result()

    def result(self) -> tuple[Any, dict[str, float]]:
        """Return the sums in the structure of what was added, and the metrics; read-only, valid until the next exchange."""
        form, total = self._form, self._total
        assert form is not None
        assert total is not None
        results = form.results(total)
        return form.structure.build(iter(results)), dict(zip(form.metrics, results[-1].tolist(), strict=True))

    def _agreed(self, ranks: Ranks, there: There) -> Form:
        """Return the form. A newcomer that has no share of its first step, a small last batch, gets it from the others."""
        if not all(there):
            source = next(rank for rank, nodes in enumerate(there) if nodes)
            told = pickle.dumps(self._form.key) if self._form is not None and ranks.rank == source else b""
            heard = ranks.gather_all(told)[source]
            if self._form is None:
                structure, arrays, metrics = pickle.loads(heard)  # noqa: S301  from a rank of this very job
                self._form = Form(structure, arrays, metrics, self._wire)
        assert self._form is not None
        return self._form
