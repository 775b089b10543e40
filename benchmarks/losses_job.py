"""The job that `benchmarks.losses` measures: steps of some milliseconds, and a stamp after every one.

Usage: python losses_job.py numpy|tensorflow STAMPS TURNS
"""

from __future__ import annotations

import time

SCRIPT = time.time()  # before anything is imported

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
from work import Images, Stamps, gradients_of  # noqa: E402

import hpc_elastic as he  # noqa: E402

KIND, STAMPS, TURNS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
STATE_BYTES = 1_000_000
SAMPLES, BATCH, WIDTH = 1 << 13, 512, 64

gradients = gradients_of(KIND, WIDTH)


def train(job: he.Job) -> None:
    """Step, and take down when each step was done."""
    stamps = Stamps(STAMPS, job.member.id)
    job.register(state=np.zeros(STATE_BYTES // 4, np.float32))
    images = Images(SAMPLES)
    ready = time.time()
    for step in job.steps(images, epochs=TURNS * BATCH // SAMPLES, batch=BATCH):
        if ready:
            stamps.began(script=SCRIPT, ready=ready, turn=time.time())
            ready = 0.0
        for micro in step.microbatches():
            step.add(gradients(micro))
        step.reduce()
        stamps.finished(step.number, job.size)


if __name__ == "__main__":
    he.run(train)
