"""The job of the demo: a softmax regression of digits in NumPy.

Usage: python slurm/demo_job.py SHARDS EPOCHS PAUSE_S
"""

from __future__ import annotations

import hashlib
import sys
import time

import numpy as np

import hpc_elastic as he

SHARDS, EPOCHS, PAUSE_S = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])


def train(job: he.Job) -> None:
    """Train; the leader prints the SHA-256 of the weights."""
    weights = np.zeros((785, 10), np.float32)
    job.register(weights=weights)
    with he.open_shards(SHARDS) as shards:
        for step in job.steps(shards, epochs=EPOCHS, batch=64):
            for micro in step.microbatches():
                pixels = micro["image"].reshape(len(micro), -1).astype(np.float32) / 255
                inputs = np.hstack([pixels, np.ones((len(micro), 1), np.float32)])
                scores = inputs @ weights
                likely = np.exp(scores - scores.max(axis=1, keepdims=True))
                likely /= likely.sum(axis=1, keepdims=True)
                hit = np.arange(len(micro)), micro["label"]
                loss = -np.log(likely[hit]).mean()
                likely[hit] -= 1
                step.add(inputs.T @ likely / np.float32(len(micro)), loss=loss)
            weights -= np.float32(0.1) * step.reduce()
            time.sleep(PAUSE_S)  # as if it were a large model
    if job.leads:
        print(f"sha256 {hashlib.sha256(weights.tobytes()).hexdigest()}", flush=True)


if __name__ == "__main__":
    he.run(train)
