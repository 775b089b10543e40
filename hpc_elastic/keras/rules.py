"""Rules for the batch and the learning rate when the number of ranks changes: pure functions, and AdaScale's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Rule = Literal["fixed", "linear", "sqrt", "adascale"]
FIXED, LINEAR, SQRT, ADASCALE = "fixed", "linear", "sqrt", "adascale"
RULES = (FIXED, LINEAR, SQRT, ADASCALE)


def batch_of(rule: str, batch: int) -> int | Callable[[int], int]:
    """Return the samples of a step, or a function of the number of ranks that does."""
    return batch if rule == FIXED else lambda ranks: batch * ranks


def factor(rule: str, scale: float) -> float:
    """Return by what the learning rate is multiplied for a batch `scale` times that of one rank; AdaScale's is `AdaScale`'s.

    Linear: Goyal et al., "Accurate, large minibatch SGD", 2017. Square root: Krizhevsky, "One weird trick for parallelizing
    convolutional neural networks", 2014, and for Adam Malladi et al., "On the SDEs and scaling rules for adaptive gradient
    algorithms", NeurIPS 2022.
    """
    return {FIXED: 1.0, LINEAR: scale, SQRT: math.sqrt(scale)}[rule]


def moments(squares: float, square: float, parts: int, part: float, base: float) -> tuple[float, float]:
    """Return unbiased estimates of the variance of the gradient of `base` samples, and of the square of the true gradient.

    Parameters
    ----------
    squares : float
        Mean of the squared norms of the gradients of `parts` microbatches of `part` samples each.
    square : float
        Squared norm of their mean.

    Returns
    -------
    variance, square : float
        Not a number for a single microbatch, which tells nothing of the variance; infinite if a gradient is not finite.
    """
    if not (math.isfinite(squares) and math.isfinite(square)):
        return math.inf, math.inf
    if parts == 1:
        return math.nan, math.nan
    variance = max(0.0, squares - square) * parts / (parts - 1)  # of the gradient of one microbatch
    return variance * part / base, max(0.0, square - variance / parts)


def gain(variance: float, square: float, scale: float) -> float:
    """Return AdaScale's gain, from 1 where the true gradient's `square` rules to `scale` where the `variance` does.

    Johnson et al., "AdaScale SGD: a user-friendly algorithm for distributed training", ICML 2020, equation 2.
    """
    below = variance / scale + square
    return (variance + square) / below if below > 0 else 1.0


class AdaScale:
    """The gain with smoothed moments, as in section 3.3 of the paper.

    Attributes
    ----------
    memory : dict of str to float
        What newcomers and checkpoints need of it: the moments, and the sum of all gains.
    """

    def __init__(self) -> None:
        self.memory = {"variance": 0.0, "square": 0.0, "weight": 0.0, "steps": 0.0}

    def factor(self, variance: float, square: float, scale: float) -> float:
        """Take in the moments of a step, and return by what its learning rate is multiplied."""
        if math.isfinite(variance) and math.isfinite(square):
            keep, old = max(0.0, 1.0 - scale / 1000.0), self.memory
            self.memory = old | {
                "variance": keep * old["variance"] + (1 - keep) * variance,
                "square": keep * old["square"] + (1 - keep) * square,
                "weight": keep * old["weight"] + (1 - keep),
            }
        weight = self.memory["weight"] or 1.0  # corrects the bias of the beginning
        found = gain(self.memory["variance"] / weight, self.memory["square"] / weight, scale)
        if not math.isinf(variance):  # else the step is left out by an optimizer that scales the loss
            self.memory["steps"] += found
        return found
