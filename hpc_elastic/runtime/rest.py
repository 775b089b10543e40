"""When the leader need not look at anything: nothing was there at the last turn, and since then nothing can have come up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .reports import Here

LOOK_S = 0.05  # by so much later than without a rest is seen what comes from outside, such as requests and free slots


class Rest(NamedTuple):
    """The leader's rest between two looks. A step costs a look when it is long, and not when it is short.

    Attributes
    ----------
    until_s : float
        When it ends.
    step : float
        The first step at which something is due by the steps themselves.
    loop : int
        Which loop the steps are of.
    world, office : object
        Who was there, and what was on: nothing that was asked for, and nothing that anybody has to be waited for.
    """

    until_s: float
    step: float
    loop: int
    world: object
    office: object

    def lasts(self, now_s: float, here: Here, world: object, office: object) -> bool:
        """Tell whether this turn is to be left alone."""
        return (
            now_s < self.until_s
            and here.cursor.step < self.step
            and here.loop == self.loop
            and world is self.world
            and office is self.office
        )


NO_REST = Rest(0.0, 0, 0, None, None)
