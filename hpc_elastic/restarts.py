"""Whether a job that was lost is started again, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME_STEP = 3  # a step that failed as often fails again
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Setback:
    """One attempt that was lost.

    Attributes
    ----------
    attempt : int
        Its number in the run.
    step : int
        The step at which it was lost, or -1 if it did none.
    reason : str
        What was lost.
    last_words : tuple of str
        What processes of it last wrote, and how they ended.
    """

    attempt: int
    step: int
    reason: str
    last_words: tuple[str, ...] = ()


def why_not(setbacks: Sequence[Setback], restarts: int) -> str:
    """Return why the job is not started again after `setbacks`, with `restarts` allowed; empty if it is."""
    step = setbacks[-1].step
    if sum(setback.step == step for setback in setbacks) >= SAME_STEP:
        return (
            f"step {step} has failed {SAME_STEP} times"
            if step >= 0
            else f"{SAME_STEP} times it failed before its first step"
        )
    if len(setbacks) > restarts:
        return f"restarts = {restarts}, {'and all are used up' if restarts else 'so it is not started again'}"
    return ""


def wait_s(setbacks: int) -> float:
    """Return how long to wait after that many setbacks: at first not at all, then longer and longer."""
    return 0.0 if setbacks <= 1 else min(2.0 ** min(setbacks - 2, 6), LONGEST_WAIT_S)


def account(setbacks: Sequence[Setback]) -> list[str]:
    """Return in lines what failed each time, and the last words of the last attempt."""
    lines = []
    for setback in setbacks:
        where = f"step {setback.step}" if setback.step >= 0 else "before its first step"
        lines.append(f"attempt {setback.attempt}, {where}: {setback.reason}")
    for words in setbacks[-1].last_words:
        lines.extend(words.splitlines())
    return [f"  {line}" for line in lines]
