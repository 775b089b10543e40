"""Counts its descriptors and its memory over many cycles of growing and shrinking: TURNS AFTER."""

import os
import sys

import numpy as np

import hpc_elastic as he

TURNS, AFTER = int(sys.argv[1]), int(sys.argv[2])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(job):
    state = np.arange(1000.0)
    job.register(state=state)
    field = job.array((100, 10))
    field.local[:] = np.arange(field.start, field.stop)[:, None]
    before = None
    for turn in job.loop(TURNS):
        assert job.comm.allreduce(1) == job.size
        np.testing.assert_array_equal(state, np.arange(1000.0))
        np.testing.assert_array_equal(field.local[:, 0], np.arange(field.start, field.stop))
        if turn == AFTER and job.leads:
            before = descriptors(), resident()
    if job.leads:
        print("descriptors", before[0], descriptors())
        print("grown_bytes", resident() - before[1], flush=True)


he.run(train)
