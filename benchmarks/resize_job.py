"""The job of `benchmarks.resize` and `benchmarks.warm`: small steps, 25 MB of state, a stamp before and after every turn.

Usage: python resize_job.py numpy|tensorflow|cnn STAMPS TURNS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from work import Images, gradients_of

import hpc_elastic as he

KIND, STAMPS, TURNS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
STATE_BYTES = 25_000_000
SAMPLES = 1 << 16

gradients = gradients_of(KIND)


def train(job: he.Job) -> None:
    """Step, and write down when each turn began and ended."""
    job.register(state=np.zeros(STATE_BYTES // 4, np.float32))
    rows = []
    try:
        for step in job.steps(Images(SAMPLES), epochs=1 + TURNS * 256 // SAMPLES, batch=256):
            begun = time.time()
            for micro in step.microbatches():
                step.add(gradients(micro))
            step.reduce()
            rows.append((step.number, begun, time.time()))
            if step.number >= TURNS:
                break
    finally:
        np.save(STAMPS / f"{job.member.id}.npy", np.array(rows, np.float64).reshape(-1, 3))


if __name__ == "__main__":
    he.run(train)
