"""The seams: what a state, a broker and a policy must offer."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from .model import Lease, Observation, Resize, Supply


@runtime_checkable
class Stateful(Protocol):
    """Anything that newcomers receive.

    `state` returns a flat mapping of names to NumPy arrays or to plain values (``None``, bool, int, float, str);
    `load` takes such a mapping, of the same names, shapes and dtypes, and puts it in place. The arrays given to `load`
    are valid during the call only.
    """

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class Broker(Protocol):
    """Where slots come from. No method blocks: a request is answered by a later `poll`."""

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:
        """Look at the supply, at step `step`, `time_s` seconds into the run; a rank needs up to `peak_bytes` of memory."""
        ...

    def next_step(self, step: int) -> float:
        """Return the first step after `step` at which the supply is another by the step alone; infinity if there is none."""
        ...

    def request(self, n: int, deadline_s: float) -> None:
        """Ask for `n` more slots, until `deadline_s` seconds into the run.

        Those granted appear among the leases, one by one perhaps; those without an answer are pending. In the end none is,
        and if not all were granted, the supply says why.
        """
        ...

    def withdraw(self) -> None:
        """Ask no more for what is pending. What was granted in the same moment still appears, to be released."""
        ...

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Give leases back; their ranks have gone. Slots where one could not start are not offered for `bar_s` seconds."""
        ...


class Policy(Protocol):
    """Decides on the number of ranks."""

    def decide(self, seen: Observation) -> Resize | None:
        """Return the resize that is to be, or None: a pure function of the observation."""
        ...

    def next_step(self, step: int, decided: int) -> float:
        """Return the first step from `step` on at which it decides something by the step alone; infinity if there is none.

        `decided` is the number of its decisions so far, as in an observation. At such a step it is asked; of anything else
        that changes, it hears a moment later.
        """
        ...


class Stepless:
    """What depends on no step: most brokers and policies."""

    def next_step(self, step: int, decided: int = 0) -> float:  # noqa: ARG002
        """Return infinity."""
        return math.inf
