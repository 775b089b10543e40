"""Passes on what a launcher prints, and where nobody reads that any more, lets it go nowhere: the job goes on.

    python -I -S relay.py FROM TO [FROM TO]     descriptors: of pipes that the launcher writes to, and of where that goes

A launcher that can't write ends, and its ranks with it: a job that is read by ``head``, or by a ``tee`` that Ctrl-C has
ended as well, would be lost before its last checkpoint is made. Run by path, this imports nothing of the package. It ends
with the launcher, and not with the supervisor, which the job outlives.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys

PIPE = 1 << 16
GONE = (errno.EPIPE, errno.EIO)  # a reader, or a terminal


def serve(ways: dict[int, int]) -> None:
    """Pass on what comes, until no launcher is left that could write."""
    deaf = set[int]()
    while ways:
        for source in select.select(list(ways), [], [])[0]:
            data = os.read(source, PIPE)
            if not data:
                del ways[source]
            while data and ways[source] not in deaf:
                try:
                    data = data[os.write(ways[source], data) :]
                except BlockingIOError:  # somebody has set it so
                    select.select([], [ways[source]], [])
                except OSError as problem:
                    if problem.errno in GONE:
                        deaf.add(ways[source])
                    break  # a disk that is full may have room for what comes next


def main() -> None:
    """Be the relay."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what comes until the launcher ends is passed on
    ends = list(map(int, sys.argv[1:]))
    serve(dict(zip(ends[::2], ends[1::2], strict=True)))


if __name__ == "__main__":
    main()
