"""How good recommendations are: NDCG and recall of the first few."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranking(NamedTuple):
    """Means over the viewers who liked something of what was held back."""

    ndcg: float
    recall: float
    viewers: int


def first(scores: NDArray[Any], seen: NDArray[Any], k: int = 10) -> NDArray[np.intp]:
    """Return the films to recommend, [viewers, k], the best first: those with the highest scores that nobody has seen yet.

    Parameters
    ----------
    scores : ndarray
        Of each viewer for each film, float [viewers, films]; of equal ones, the film with the lower number comes first.
    seen : ndarray
        What not to recommend, [viewers, films], true or not.
    k : int
        How many to recommend.
    """
    return np.argsort(-np.where(seen, -np.inf, scores), axis=1, kind="stable")[:, :k]


def rank(scores: NDArray[Any], seen: NDArray[Any], liked: NDArray[Any], k: int = 10) -> Ranking:
    """Return how good it is to recommend by `scores`, those in `liked`, [viewers, films], being right.

    NDCG as by Järvelin and Kekäläinen (ACM TOIS 20(4), 2002): a right film at place i counts 1 / log2(i + 1), over what the
    best list would have. Recall is the share of the right films that are recommended.
    """
    right = np.take_along_axis(liked.astype(bool), first(scores, seen, k), axis=1)
    wanted = liked.astype(bool).sum(axis=1)
    some = wanted > 0
    worth = 1 / np.log2(np.arange(2, k + 2))
    best = np.cumsum(worth)[np.minimum(wanted[some], k) - 1]
    ndcg = (right[some] * worth).sum(axis=1) / best
    return Ranking(float(ndcg.mean()), float((right[some].sum(axis=1) / wanted[some]).mean()), int(some.sum()))
