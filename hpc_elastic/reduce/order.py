"""The order of the canonical sum: one fixed binary tree over the microbatches 0 … L-1. Pure.

Leaves 2k and 2k+1 are summed first, then pairs of those sums, and so on; a sum without a partner, at the end or because
the partner has no samples, passes on upwards. A rank sums the subtrees that lie whole in its interval, and the sums of
all ranks are combined along the same tree, so that every addition has the same operands whatever the number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ..errors import StepError
from ..partition import blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

T = TypeVar("T")
Tree = int | tuple[Any, Any]  # the number of a value, or two trees


class Node(NamedTuple):
    """The subtree over the leaves ``[index << level, (index + 1) << level)``, as far as there are any."""

    level: int
    index: int  # type: ignore[assignment]  # nobody searches a Node, so tuple.index is not missed

    @property
    def start(self) -> int:
        """Its first leaf."""
        return self.index << self.level

    @property
    def stop(self) -> int:
        """The leaf after its last, as if there were leaves without end."""
        return (self.index + 1) << self.level

    def leaves(self, total: int) -> range:
        """Return its leaves, of `total` there are."""
        return range(min(total, self.start), min(total, self.stop))


def roots(start: int, stop: int, leaves: int) -> tuple[Node, ...]:
    """Return the largest subtrees that tile the interval ``[start, stop)`` of `leaves` leaves, in order."""
    found = []
    while start < stop:
        level = 0
        # A subtree that is cut off at the last leaf is whole; the loop ends where growing adds no leaf.
        while start % (2 << level) == 0 and min(leaves, start + (2 << level)) <= stop and start + (1 << level) < leaves:
            level += 1
        found.append(Node(level, start >> level))
        start = min(leaves, start + (1 << level))
    return tuple(found)


def present(nodes: Collection[Node], empty: Collection[int], leaves: int) -> list[Node]:
    """Return those of `nodes` that have a leaf which is not `empty`."""
    return [node for node in nodes if any(leaf not in empty for leaf in node.leaves(leaves))]


There = tuple[tuple[Node, ...], ...]  # for each rank, the subtrees whose sums it has


class TreeSum(Generic[T]):
    """Combines values along the tree, each two as soon as both are there.

    It serves a rank for its own leaves (`subtrees`) and everybody for the subtrees of all ranks (`total`). It keeps
    about one value a level, not one a leaf.

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
        self._stack: list[tuple[int, T]] = []  # a leaf of each value's subtree, which is enough to find where two meet
        self._next = first  # the leaf that may come next

    def feed(self, node: Node, value: T) -> None:
        """Add the value of `node`.

        Nodes come in the order of their leaves. Those without a value may be left out, or be told of by `skip`.

        Raises
        ------
        StepError
            If `node` comes after one that lies behind it, or overlaps one that was fed.
        """
        if node.start < self._next:
            raise StepError(f"microbatch {node.start} was added after {self._next - 1}: add them in their order, each once")
        if node.start > self._next:
            self._settle(node.start)
        self._stack.append((node.start, value))
        self._settle(node.stop)

    def skip(self, node: Node) -> None:
        """Say that `node` has no value: what waited for it is combined now, not at the next `feed`."""
        self._settle(max(node.stop, self._next))

    def _settle(self, start: int) -> None:
        """Combine what can get no further operand, now that no leaf before `start` comes any more."""
        self._next, stack = start, self._stack
        while len(stack) > 1:
            (a, left), (b, right) = stack[-2], stack[-1]
            level = (a ^ b).bit_length()  # of the smallest subtree that holds both
            index = a >> level
            if (index + 1) << level > start or index << level < self._first:
                return
            stack.pop()
            stack[-1] = a, self._combine(left, right)

    def subtrees(self, wanted: Collection[Node]) -> list[T]:
        """Return the values of the subtrees `wanted`, in order: those that tile all that was fed and have a value."""
        stack, found = self._stack, []
        if len(stack) == len(wanted):  # all that could be combined has been
            self._stack, self._next = [], self._first
            return [value for _, value in stack]
        for node in wanted:
            self._stack = [(leaf, value) for leaf, value in stack if node.start <= leaf < node.stop]
            self._settle(node.stop)
            ((_, value),) = self._stack
            found.append(value)
        self._stack, self._next = [], self._first
        return found

    def total(self) -> T:
        """Return the sum of all that was fed: at least one node."""
        stack, self._stack, self._next = self._stack, [], self._first
        while len(stack) > 1:
            _, right = stack.pop()
            leaf, left = stack[-1]
            stack[-1] = leaf, self._combine(left, right)
        ((_, value),) = stack
        return value


def pairs(nodes: Iterable[Node]) -> Tree:
    """Return how the values of `nodes`, which come in the order of their leaves, are added up: pairs of their numbers."""
    tree: TreeSum[Tree] = TreeSum(lambda left, right: (left, right))
    for number, node in enumerate(nodes):
        tree.feed(node, number)
    return tree.total()


@lru_cache(maxsize=8)
def shares(leaves: int, ranks: int, empty: frozenset[int]) -> There:
    """Return the subtrees that each rank has the sums of, if the leaves `empty` have no value."""
    cuts = blocks(leaves, ranks)
    return tuple(tuple(present(roots(start, stop, leaves), empty, leaves)) for start, stop in cuts)


@lru_cache(maxsize=8)
def whole_tree(there: There) -> Tree:
    """Return how all that the ranks have is added up."""
    return pairs(node for nodes in there for node in nodes)


def united(parts: Collection[Node], others: Collection[Node], leaves: int) -> list[Node]:
    """Return the largest subtrees that hold values of `parts` and none of `others`, in order."""
    found = []

    def descend(node: Node) -> None:
        inside = [part for part in parts if _within(part, node)]
        if inside and not any(_touch(other, node) for other in others):
            found.append(node)
        elif inside:
            descend(Node(node.level - 1, 2 * node.index))
            descend(Node(node.level - 1, 2 * node.index + 1))

    descend(Node(max(0, (leaves - 1).bit_length()), 0))
    return found


def _within(part: Node, node: Node) -> bool:
    return node.start <= part.start and part.stop <= node.stop


def _touch(one: Node, other: Node) -> bool:
    return one.start < other.stop and other.start < one.stop
