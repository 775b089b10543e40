"""Ends DELAY_S seconds after a newcomer has reported itself ready: while newcomers are being connected."""

import sys
import time

import hpc_elastic as he

DELAY_S = float(sys.argv[1])


def train(job):
    ready_s = float("inf")
    for _ in job.loop(10_000_000):
        time.sleep(0.002)  # stands for a computation
        if ready_s == float("inf") and any(job.session.run.newcomers.glob("*.report.json")):
            ready_s = time.perf_counter()
        if job.size > 1 or time.perf_counter() > ready_s + DELAY_S:
            break


he.run(train)
