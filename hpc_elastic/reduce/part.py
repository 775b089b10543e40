"""The part of a sum that lies in one place, on the host or on this rank's GPU: it is added up by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..arrays.host import Array
from .form import Slot, Slots
from .half import plus, store
from .node import Transport
from .order import Node, There, TreeSum

if TYPE_CHECKING:
    from . import Ranks


class Part:
    """The arrays in one place.

    Parameters
    ----------
    slots : Slots
        Memory there. Its form is that of these arrays.
    numbers : sequence of int, optional
        Which of the sum's arrays they are; all by default.
    first : callable
        Returns the first microbatch of this rank.
    way : callable
        Returns how partial sums there are added up over ranks. Collective.
    """

    def __init__(
        self, slots: Slots, numbers: Sequence[int] | None, first: Callable[[], int], way: Callable[[Ranks], Transport[Any]]
    ) -> None:
        self.form = slots.form
        self.numbers = numbers
        self._slots = slots
        self._first = first
        self._way = way
        self._tree: TreeSum[Slot] | None = None
        self._held: list[Slot] = []  # of the last sum, which others may still read, or which is its result
        self._total: Slot | None = None
        self._transport: Transport[Any] | None = None
        self._among: Ranks | None = None  # whom the transport is for

    @property
    def results(self) -> list[Array]:
        """The arrays of the last sum."""
        assert self._total is not None
        return self.form.results(self._total)

    def add(self, index: int, arrays: Sequence[Array], weights: Sequence[float | None]) -> None:
        """Contribute microbatch `index`: those of the sum's `arrays` that are here, times their weights where there are."""
        slot = self._slots.take()
        own = range(len(arrays)) if self.numbers is None else self.numbers
        for number, target in zip(own, slot.arrays, strict=False):  # without metrics, theirs has no place to fill
            store(arrays[number], weights[number], target)
        if self._tree is None:
            self._tree = TreeSum(self._combine, self._first())
        self._tree.feed(Node(0, index), slot)

    def _combine(self, left: Slot, right: Slot) -> Slot:
        for dtype, values in left.flat.items():
            if len(values):
                plus(values, right.flat[dtype], values)
        self._slots.give((right,))
        return left

    def drop(self, *, added: bool) -> None:
        """Forget what was `added` since the last sum."""
        if added:
            self._slots.recall(self._held)
        self._tree = None

    def exchange(self, ranks: Ranks, there: There, *, large: bool) -> None:
        """Add up over all ranks. Collective."""
        mine = self._tree.subtrees(there[ranks.rank]) if self._tree is not None else []
        self._tree = None
        if ranks.size == 1:
            self._total = mine[0]
        elif large:
            self._total = self._across(ranks).large(self.form, self._slots, mine, there)
        else:
            self._total = self._across(ranks).small(self.form, self._slots, mine, there)
        done, self._held = (self._held + mine, []) if large else (self._held, mine)
        self._slots.give(done)

    def _across(self, ranks: Ranks) -> Transport[Any]:
        if self._transport is None or self._among is not ranks:
            self._transport, self._among = self._way(ranks), ranks
        return self._transport
