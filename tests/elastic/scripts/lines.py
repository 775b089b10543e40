"""Every rank prints one line in parts, while the others print theirs."""

import sys
import time

import hpc_elastic as he


class Slow:
    """Takes a while to be printed."""

    def __str__(self):
        time.sleep(0.3)  # the other ranks print the beginnings of their lines meanwhile
        return "line"


def train(job):
    for _ in job.loop(1):
        for stream in (sys.stdout, sys.stderr):
            print("a", "whole", Slow(), file=stream)


if __name__ == "__main__":
    he.run(train)
