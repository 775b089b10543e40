"""The order of the canonical sum: one fixed binary tree over the microbatches 0 … L-1. Pure.

Leaves 2k and 2k+1 are summed first, then pairs of those sums, and so on; a sum without a partner passes on upwards. A rank
sums the subtrees that lie whole in its interval, and the sums of all ranks are combined along the same tree, so that every
addition has the same two operands whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    """The subtree over the leaves ``[index << level, (index + 1) << level)``, as far as there are any."""

    level: int
    index: int

    def leaves(self, total: int) -> range:
        """Return its leaves, of `total` there are."""
        return range(min(total, self.index << self.level), min(total, (self.index + 1) << self.level))


def roots(start: int, stop: int, total: int) -> tuple[Node, ...]:
    """Return the largest subtrees that tile the leaves ``[start, stop)`` of `total`, in order."""
    found = []
    while start < stop:
        level = 0
        while start % (2 << level) == 0 and min(total, start + (2 << level)) <= stop and start + (1 << level) < total:
            level += 1
        found.append(Node(level, start >> level))
        start = min(total, start + (1 << level))
    return tuple(found)


def present(nodes: Collection[Node], empty: Collection[int], total: int) -> list[Node]:
    """Return those of `nodes` that have a leaf which is not `empty`."""
    return [node for node in nodes if any(leaf not in empty for leaf in node.leaves(total))]


class TreeSum(Generic[T]):
    """Combines values along the tree as soon as both operands are there.

    Parameters
    ----------
    combine : callable
        ``combine(left, right)`` returns their sum and may work in place.
    first : int
        First leaf of the interval that is fed; subtrees that reach back before it are not formed.
    """

    def __init__(self, combine: Callable[[T, T], T], first: int = 0) -> None:
        self._combine = combine
        self._first = first
        self._stack: list[tuple[Node, T]] = []

    def feed(self, node: Node, value: T) -> None:
        """Add the value of `node`; nodes come in the order of their leaves, and those without a value are left out."""
        start = node.index << node.level
        self._settle(start)
        self._stack.append((node, value))

    def _settle(self, start: int) -> None:
        """Combine what can get no further operand, now that the next leaf is `start`."""
        while len(self._stack) > 1:
            (a, left), (b, right) = self._stack[-2:]
            meet = _meeting(a, b)
            if ((meet.index + 1) << meet.level) > start or (meet.index << meet.level) < self._first:
                return
            self._stack[-2:] = [(meet, self._combine(left, right))]

    def subtrees(self, wanted: Collection[Node]) -> list[T]:
        """Return the values of the subtrees `wanted`, in order: those that tile all that was fed and have a value."""
        stack, found = self._stack, []
        for node in wanted:
            low, high = node.index << node.level, (node.index + 1) << node.level
            self._stack = [(part, value) for part, value in stack if low <= part.index << part.level < high]
            self._settle(high)
            ((_, value),) = self._stack
            found.append(value)
        self._stack = []
        return found

    def total(self) -> T:
        """Return the sum of all that was fed."""
        while len(self._stack) > 1:
            (a, left), (b, right) = self._stack[-2:]
            self._stack[-2:] = [(_meeting(a, b), self._combine(left, right))]
        ((_, value),) = self._stack
        self._stack = []
        return value


def _meeting(a: Node, b: Node) -> Node:
    """Return the smallest subtree that holds both."""
    level = max(a.level, b.level)
    left, right = a.index >> (level - a.level), b.index >> (level - b.level)
    while left != right:
        left, right, level = left >> 1, right >> 1, level + 1
    return Node(level, left)
