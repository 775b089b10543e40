"""A heated plate on a distributed array, slowed down, as a test job: SIZE TURNS PAUSE."""

import hashlib
import sys
import time

import numpy as np

import hpc_elastic as he
from jobs.heat2d.heat import heat, sweep

SIZE, TURNS, PAUSE = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])


def train(job):
    plate = job.array((SIZE, SIZE), np.float64, name="plate")
    heat(plate.local, plate.start, SIZE)
    for _ in job.loop(TURNS):
        above, below = plate.halo(1)
        if len(plate.local):
            plate.local = sweep(plate.local, above, below)
        time.sleep(PAUSE)  # stands for a turn that computes for so long: ranks come and go meanwhile
    whole = plate.gather()
    if whole is not None:
        print("sha256", hashlib.sha256(whole.tobytes()).hexdigest())
        print("ranks", job.size, flush=True)


if __name__ == "__main__":
    he.run(train)
