"""Where a rank stands: which resize point or sum it is at, what it has of it, and what the survivors of a loss agreed on."""

from __future__ import annotations

from .agreement import NOTHING, UNKNOWN, Verdict


class Place:
    """The place of one rank; points and sums alternate, as `agreement` says.

    Attributes
    ----------
    point : int
        The last resize point it came to, -1 before the first.
    word : int
        The word of that point, `UNKNOWN` as long as it has not come.
    ready : bool
        It lacks nothing of what its place gives, and waits for the others only.
    unwound : str
        Why it can't go on where it is; empty if it can.
    """

    def __init__(self) -> None:
        self.point, self.word, self.ready, self.unwound = -1, UNKNOWN, False, ""
        self._in_sum = False
        self._verdict: Verdict | None = None

    @property
    def number(self) -> int:
        """The number of the place, as accounts have it."""
        return 2 * self.point + self._in_sum

    def at_point(self, word: int = UNKNOWN) -> None:
        """Come to the next resize point, whose `word` may be known."""
        self.point, self.word = self.point + 1, word
        self._in_sum = self.ready = False

    def at_sum(self) -> None:
        """Come to the sum behind the point, or back to it."""
        self._in_sum, self.ready = True, False

    def called_in(self, point: int, word: int) -> None:
        """Be, in a newcomer, where the members are."""
        self.point, self.word = point, word

    def agreed(self, verdict: Verdict) -> None:
        """Know what the survivors agreed on, and say so in the next account."""
        self._verdict = verdict
        self.word = verdict.word if self.point == verdict.point else NOTHING

    def foretold(self) -> int:
        """Return the word of this point if the survivors of a loss agreed that it has been given, else `UNKNOWN`."""
        verdict = self._verdict
        if verdict is None or self.point > verdict.point:
            return UNKNOWN
        return NOTHING if self.point < verdict.point else verdict.word

    def again(self) -> bool:
        """Tell whether the survivors have to do this sum anew."""
        return self._verdict is not None and self._verdict.redo == self.number
