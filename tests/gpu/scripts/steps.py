"""A regression in NumPy whose gradients lie on the host, on a GPU, or on a stand-in for one.

Usage: steps.py SHARDS {host,gpu,fake} MARK. Process 1 kills itself in step 20, once, if there is no file MARK.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import hpc_elastic as he

SHARDS, DEVICE, MARK = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if DEVICE == "fake":
    import pytest

    from tests.unit import fake_cupy

    fake_cupy.install(pytest.MonkeyPatch(), devices=3)


def train(job: he.Job) -> None:
    """Train, and print the weights' digest."""
    weights = np.zeros((64, 10), np.float32)
    job.register(weights=weights)
    put = np.asarray
    if DEVICE != "host":
        import cupy

        job.gpu()
        put = cupy.asarray
    with he.open_shards(SHARDS) as shards:
        for step in job.steps(shards, epochs=3, batch=64):
            for micro in step.microbatches():
                if step.number == 20 and job.member.id == 1 and not MARK.exists():
                    MARK.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                x = micro["image"].reshape(len(micro), -1).astype(np.float32) / 255
                off = x @ weights - np.eye(10, dtype=np.float32)[micro["label"]]
                step.add({"far": put(x.T @ off / len(micro)), "near": [off.mean(axis=0)]}, loss=float((off**2).mean()))
            total = step.reduce()
            assert isinstance(total["near"][0], np.ndarray)
            far = total["far"] if DEVICE == "host" else total["far"].get()
            weights -= np.float32(0.01) * (far + total["near"][0])
            time.sleep(0.01)  # stands for a larger model: ranks come and go while it computes
    if job.leads:
        print("loss", step.metrics["loss"].hex())
        print("sha256", hashlib.sha256(weights.tobytes()).hexdigest(), flush=True)


he.run(train)
