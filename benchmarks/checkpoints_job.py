"""The job that `benchmarks.checkpoints` measures, with a stamp after every step.

Usage: python checkpoints_job.py state STAMPS BYTES        a state of so many bytes, and a gradient as large
       python checkpoints_job.py machinery STAMPS BATCH    a small one, half of its steps without what losses need
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from work import Images, Stamps, gradients_of

import hpc_elastic as he

if TYPE_CHECKING:
    from hpc_elastic.runtime.membership import Membership

KIND, STAMPS, AMOUNT = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
TURNS = 1_000_000  # more than enough: the job is stopped
BLOCK = 10  # steps with the machinery, and as many without
EPOCH = 21  # steps of an epoch: what begins one, making its order, comes as often in the ones as in the others


def with_state(job: he.Job) -> None:
    """Train: the state is one array, and the gradient as large as that."""
    weights = np.zeros(AMOUNT // 4, np.float32)
    gradient = np.empty_like(weights)
    job.register(weights=weights)
    stamps = Stamps(STAMPS, job.member.id)
    for step in job.steps(Images(1024), epochs=TURNS, batch=1024):
        for micro in step.microbatches():
            np.multiply(weights, np.float32(0.01), out=gradient)
            gradient += np.float32(micro["image"].mean() - 127)
            step.add([gradient])
        (total,) = step.reduce()
        weights -= np.float32(0.1) * total
        stamps.finished(step.number, job.size)


def with_machinery(job: he.Job) -> None:
    """Train, with and without what is there for losses."""
    gradients = gradients_of("numpy")
    job.register(state=np.zeros(1000, np.float32))
    stamps = Stamps(STAMPS, job.member.id)
    for step in job.steps(Images(EPOCH * AMOUNT), epochs=TURNS, batch=AMOUNT):
        (bare if step.number // BLOCK % 2 else whole)(job.membership)
        for micro in step.microbatches():
            step.add(gradients(micro))
        step.reduce()
        stamps.finished(step.number, job.size)


def bare(membership: Membership) -> None:
    """Take away what is there for losses: the barrier behind each sum, and the looks whether the others are alive."""

    def summed(_here: Any, exchange: Callable[[], None]) -> bool:
        exchange()
        return True

    membership.summed = summed
    membership.vigil.check = membership.watch.check = lambda: None


def whole(membership: Membership) -> None:
    """Put it back."""
    membership.__dict__.pop("summed", None)
    membership.vigil.__dict__.pop("check", None)
    membership.watch.check = membership.vigil.check


if __name__ == "__main__":
    he.run(with_state if KIND == "state" else with_machinery)
