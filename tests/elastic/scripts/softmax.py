"""A small softmax regression in NumPy, as a test job: SHARDS EPOCHS [--pause S] [--fail RANK:STEP] [--wire NAME] ..."""

import argparse
import hashlib
import os
import time
from pathlib import Path

import numpy as np

import hpc_elastic as he
from hpc_elastic import reduce
from hpc_elastic.comm import board

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("epochs", type=int)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--until", type=Path)  # pauses end when there is this file
parser.add_argument("--fail", default="")
parser.add_argument("--how", default="raise")
parser.add_argument("--noise", action="store_true")
parser.add_argument("--warm", type=float, default=0.0)
parser.add_argument("--wire")
parser.add_argument("--apart", action="store_true")  # as if each rank were on a host of its own
arguments = parser.parse_args()
if arguments.apart:
    board._page = lambda _pid, _card: None
    reduce.SMALL_BYTES = 0


def gradients(weights, micro):
    x = micro["image"].reshape(len(micro), -1).astype(np.float32) / 255
    scores = x @ weights["w"] + weights["b"]
    scores -= scores.max(axis=1, keepdims=True)
    p = np.exp(scores)
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(micro)), micro["label"]]).mean()
    p[np.arange(len(micro)), micro["label"]] -= 1
    p /= len(micro)
    return loss, {"w": x.T @ p, "b": p.sum(axis=0)}


def noisy(fields, random):
    time.sleep(0.001)  # stands for decoding: it is done ahead
    noise = random.integers(-20, 20, fields["image"].shape)
    return {**fields, "image": np.clip(fields["image"] + noise, 0, 255).astype(np.uint8)}


def pause():
    """Stand for a larger model: ranks come and go while it computes."""
    if arguments.until is None or not arguments.until.exists():
        time.sleep(arguments.pause)


def train(job):
    weights = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
    momentum = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
    job.register(weights=weights, momentum=momentum)
    if not job.joined:
        time.sleep(arguments.warm)  # stands for slow imports
    fail_rank, fail_step = map(int, arguments.fail.split(":")) if arguments.fail else (-1, -1)
    with he.open_shards(arguments.shards) as shards:
        how = {"decode": noisy if arguments.noise else None, "wire": arguments.wire}
        epochs, batch = np.array([arguments.epochs, arguments.batch])  # NumPy's numbers do as well
        for step in job.steps(shards, epochs=epochs, batch=batch, **how):
            if (job.rank, step.number) == (fail_rank, fail_step):
                if arguments.how == "raise":
                    raise ValueError("deliberate failure")
                if arguments.how == "exit":
                    raise SystemExit(0)
                os._exit(9)
            for micro in step.microbatches():
                loss, grads = gradients(weights, micro)
                step.add(grads, loss=loss)
            total = step.reduce()
            for name, value in total.items():
                momentum[name] *= np.float32(0.9)
                momentum[name] += value
                weights[name] -= np.float32(0.5) * momentum[name]
            if step.number % 10 == 9:
                job.log(val=step.number)  # stands for a validation
            pause()
    if job.leads:
        digest = hashlib.sha256(b"".join(weights[name].tobytes() for name in sorted(weights)))
        print("sha256", digest.hexdigest())
        print("loss", step.metrics["loss"].hex(), flush=True)
        print("ranks", job.size, flush=True)


if __name__ == "__main__":
    he.run(train)
