"""The same ratings, the same split, by what is popular, and by scikit-learn's factorisations of who liked what.

``python -m jobs.recommend.baseline``
"""

from __future__ import annotations

import numpy as np

from .prepare import LIKED, marked, ratings, split
from .ranking import rank

WIDTHS = (8, 16, 32)


def main() -> None:
    """Print how good their recommendations are."""
    from sklearn.decomposition import NMF, TruncatedSVD

    rows = ratings()
    before = split(rows)
    liked = marked(rows, before & (rows.stars >= LIKED)).astype(np.float32)
    seen, wanted = marked(rows, before), marked(rows, ~before & (rows.stars >= LIKED))

    def show(name: str, scores: np.ndarray) -> None:
        found = rank(scores, seen, wanted)
        print(f"{name}: ndcg@10 {found.ndcg:.4f}, recall@10 {found.recall:.4f}")

    show("popular", np.broadcast_to(liked.sum(axis=0), liked.shape))
    for width in WIDTHS:
        for model in (TruncatedSVD(width, random_state=0), NMF(width, random_state=0, init="nndsvda", max_iter=500)):
            show(f"{type(model).__name__} of {width}", model.fit_transform(liked) @ model.components_)


if __name__ == "__main__":
    main()
