"""The same images, the same split, by scikit-learn: logistic regression of the pixels.

``python -m jobs.image.baseline --data digits --task upright``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import hpc_elastic as he

from .prepare import CLASSES, TASKS, prepare


def main() -> None:
    """Print its accuracy."""
    from sklearn.linear_model import LogisticRegression

    parser = argparse.ArgumentParser(prog="jobs.image.baseline", description=__doc__)
    parser.add_argument("--data", choices=tuple(CLASSES), default="digits")
    parser.add_argument("--task", choices=TASKS, default="upright")
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where the shards are, or will be, put")
    chosen = parser.parse_args()
    parts = []
    for folder in prepare(chosen.data, chosen.task, chosen.folder / f"{chosen.data}-{chosen.task}"):
        with he.open_shards(folder) as shards:
            samples = shards.gather(np.arange(len(shards)))
            parts.append((samples["image"].reshape(-1, 784) / np.float32(255), samples["label"]))
    (images, labels), (test, actual) = parts
    model = LogisticRegression(C=0.1, max_iter=100, tol=1e-3).fit(images, labels)
    print(f"logistic regression: accuracy {np.mean(model.predict(test) == actual):.4f}")


if __name__ == "__main__":
    main()
