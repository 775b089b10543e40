"""The sum as MPI's own reduction makes it, in an order of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..arrays.host import Array
from .adding import add_up
from .form import Form, Pool, Slot
from .order import There, pairs


class Reducing(Protocol):
    """What the ranks have for that."""

    rank: int

    def library_sum(self, array: Array) -> None: ...


class Library:
    """The transport of ``exact=False``."""

    def __init__(self, ranks: Reducing) -> None:
        self._ranks = ranks

    def small(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:
        return self.large(form, pool, mine, there)

    def large(self, form: Form, pool: Pool, mine: Sequence[Slot], there: There) -> Slot:  # noqa: ARG002
        total = pool.own
        tree = pairs(there[self._ranks.rank]) if mine else None
        for dtype, out in total.flat.items():
            if tree is None:
                out.fill(0)
            else:
                add_up(tree, [slot.flat[dtype] for slot in mine], out)
            if len(out):
                self._ranks.library_sum(out)
        return total
