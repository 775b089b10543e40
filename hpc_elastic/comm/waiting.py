"""The one way to wait for MPI: poll the request, watch for the job's failure, give the core away when it takes long."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec
from mpi4py import MPI

from ..errors import MembershipError

YIELD_S = 0.002  # how long to poll with only a yield between, before sleeping
LONGEST_SLEEP_S = 0.002
CHECK_EVERY_S = 0.05


class Watch:
    """Waits that end when the job has failed elsewhere.

    Parameters
    ----------
    check : callable
        Called about every 50 ms while waiting; raises when there is nothing left to wait for.
    """

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.check = check

    def until(self, done: Callable[[], bool], deadline_s: float | None = None, what: str = "") -> None:
        """Return when `done()` is true.

        Raises
        ------
        MembershipError
            If that takes longer than `deadline_s` seconds.
        """
        if done():
            return
        start = now = time.monotonic()
        next_check = start + CHECK_EVERY_S
        while not done():
            if now - start < YIELD_S:
                os.sched_yield()
            else:
                time.sleep(min(LONGEST_SLEEP_S, (now - start) / 50))
            now = time.monotonic()
            if now >= next_check:
                self.check()
                next_check = now + CHECK_EVERY_S
                if deadline_s is not None and now - start > deadline_s:
                    raise MembershipError(f"waited {deadline_s:.0f} s for {what or 'the other ranks'}: given up")

    def request(self, request: MPI.Request) -> None:
        """Wait for one non-blocking operation."""
        self.until(request.Test)

    def requests(self, requests: list[MPI.Request]) -> None:
        """Wait for several non-blocking operations."""
        self.until(lambda: MPI.Request.Testall(requests))


def send(comm: MPI.Comm, rank: int, tag: int, message: msgspec.Struct) -> None:
    """Send a small `message` to `rank`; does not wait for its receipt as long as it is small."""
    comm.Send([msgspec.msgpack.encode(message), MPI.BYTE], dest=rank, tag=tag)


def take(comm: MPI.Comm, rank: int, tag: int) -> bytes | None:
    """Return a message from `rank` if one has come, else None."""
    return take_any(comm, tag, rank)[0]


def take_any(comm: MPI.Comm, tag: int, rank: int = MPI.ANY_SOURCE) -> tuple[bytes | None, int]:
    """Return a message if one has come, else None, and the rank that sent it."""
    status = MPI.Status()
    found = comm.Improbe(source=rank, tag=tag, status=status)
    if found is None:
        return None, -1
    data = bytearray(status.Get_count(MPI.BYTE))
    found.Recv([data, MPI.BYTE])
    return bytes(data), status.Get_source()
