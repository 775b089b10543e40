"""The one way to wait for MPI: poll the request, watch for the job's failure, give the core away when it takes long."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec
from mpi4py import MPI

from ..errors import LostRank, MembershipError
from ..model import Member
from .user import Mark

T = TypeVar("T")

YIELD_S = 0.002  # how long to poll with only a yield between, before sleeping
BYTES_PER_S = 0.5e9  # and as long as messages of many bytes may take: MPICH moves a little of them with every poll
LARGE_BYTES = 1 << 20  # from here on each of the pieces of which messages consist may take
STEADY_S = 0.1  # as long as that
LONGEST_SLEEP_S = 0.002
CHECK_EVERY_S = 0.005
LONGEST_CALL_S = 20.0  # of a call that brings ranks together, for which all are there when it begins
LONGEST_EXIT_S = 20
BLAME_S = 10.0  # how long somebody to blame for an error of MPI's is looked for


class Lost(LostRank):
    """A process that this rank works with is no more, or others have begun to agree on how to go on without one.

    Parameters
    ----------
    numbers : frozenset of int
        The processes known to be lost; empty if only the others know.
    """

    def __init__(self, numbers: frozenset[int] = frozenset()) -> None:
        who = ", ".join(map(str, sorted(numbers))) or "unknown"
        super().__init__(f"process {who} was lost where the job can't go on without it")
        self.numbers = numbers


class LeftOut(LostRank):
    """The others have gone on without this process: it had stalled, or its resize was called off. It ends alone."""


# What was under way when a rank was lost. MPI may still write into the buffers of these requests, so they are kept.
_given_up: list[MPI.Request] = []


def keep(requests: Iterable[MPI.Request]) -> None:
    """Keep what was under way, with its buffers, until this process ends."""
    _given_up.extend(requests)


# Threads inside a call of MPI's that can't be left and may never end.
_forsaken: list[threading.Thread] = []


def forsake(thread: threading.Thread) -> None:
    """Leave `thread` inside its call of MPI's: whoever it waits for there will not come."""
    _forsaken.append(thread)


def forsaken() -> bool:
    """Tell whether a thread of this process is left inside a call of MPI's: ``MPI_Finalize`` would crash or hang then."""
    return any(thread.is_alive() for thread in _forsaken)


def end_in_time() -> None:
    """Have the kernel end this process, if it has not ended after `LONGEST_EXIT_S` seconds.

    A process that has left a thread inside a call of MPI's can hang in the destructors of its libraries.
    """
    if _forsaken:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST_EXIT_S)


@contextlib.contextmanager
def limited(limit_s: int) -> Iterator[None]:
    """Have the kernel end this process if a ``with`` block takes longer than `limit_s` seconds.

    For calls of MPI's that hold the interpreter's lock, in which no Python code can do that.
    """
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def busy(nbytes: int, large_bytes: int = LARGE_BYTES) -> float:
    """Return for how many seconds to poll without pauses for one message of several, with `nbytes` bytes in all."""
    return YIELD_S + nbytes / BYTES_PER_S if nbytes < large_bytes else STEADY_S


class Watch:
    """Waits that end when a rank is lost or the job has failed elsewhere.

    Parameters
    ----------
    check : callable
        Called every few milliseconds while waiting; raises when there is nothing left to wait for.
    broken : callable
        Tells whether a connection with another rank has broken, and it is not known yet why: nothing must be sent then.
    blocking, users : callable
        Return a context for a call of MPI's that can't be left, the runtime's own or the user's; take those who take part.
    """

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        blocking: Mark = contextlib.nullcontext,
        users: Mark = contextlib.nullcontext,
        broken: Callable[[], bool] = lambda: False,
    ) -> None:
        self.check = check
        self._broken = broken
        self.users = users
        self._blocking = blocking
        self._since = 0.0  # when the wait under way began, if it has become a long one

    def seconds(self) -> float:
        """Return for how long the wait under way has lasted; 0 if there is none."""
        since = self._since
        return time.monotonic() - since if since else 0.0

    def apart(self, call: Callable[[], T]) -> T:
        """Make a `call` of MPI's that can't be left, in a thread that can be: it is forsaken if a rank is lost meanwhile."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:  # noqa: BLE001  (raised below)
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            self.until(lambda: bool(results or errors), LONGEST_CALL_S)
        except MembershipError:
            forsake(thread)
            raise LostRank(f"a call of MPI's that brings ranks together did not end within {LONGEST_CALL_S:.0f} s") from None
        except BaseException:
            forsake(thread)
            raise
        if errors:
            raise errors[0]
        return results[0]

    @contextlib.contextmanager
    def blocking(self, members: Iterable[Member]) -> Iterator[None]:
        """Mark a call of MPI's that can't be left: the process ends if one of `members` does."""
        with self._blocking(members), self.blame():
            yield

    def until(
        self, done: Callable[[], bool], deadline_s: float | None = None, what: str = "", busy_s: float = YIELD_S
    ) -> None:
        """Return when `done()` is true. For `busy_s` seconds it is asked without pauses, then with pauses.

        Raises
        ------
        MembershipError
            If that takes longer than `deadline_s` seconds.
        """
        if done():
            return
        start = now = time.monotonic()
        next_check = start + CHECK_EVERY_S
        try:
            while not done():
                if now - start < busy_s:
                    os.sched_yield()
                else:
                    time.sleep(min(LONGEST_SLEEP_S, (now - start) / 50))
                now = time.monotonic()
                if now >= next_check:
                    self._since = start
                    self.check()
                    next_check = now + CHECK_EVERY_S
                    if deadline_s is not None and now - start > deadline_s:
                        raise MembershipError(f"waited {deadline_s:.0f} s for {what or 'the other ranks'}: given up")
        finally:
            self._since = 0.0

    def request(self, request: MPI.Request, nbytes: int = 0) -> None:
        """Wait for one non-blocking operation."""
        self.requests([request], nbytes)

    def requests(self, begun: Iterable[MPI.Request], nbytes: int = 0, look: Callable[[], None] | None = None) -> None:
        """Begin several non-blocking operations, and wait for them; by them this rank sends and receives `nbytes` bytes.

        `look` is called when they are not yet done.
        """
        requests: list[MPI.Request] = []
        try:
            self.begin(begun, requests)
            self.finish(requests, busy(nbytes), look)
        except BaseException:
            keep(requests)
            raise

    def begin(self, begun: Iterable[MPI.Request], requests: list[MPI.Request]) -> None:
        """Begin non-blocking operations, and add them to `requests`."""
        with self.blame():
            while self._broken():
                self.check()
                time.sleep(CHECK_EVERY_S)
            requests.extend(begun)

    def finish(self, requests: list[MPI.Request], busy_s: float = YIELD_S, look: Callable[[], None] | None = None) -> None:
        """Wait for operations that have begun; there are pauses when none of them has ended for `busy_s` seconds."""
        left = True

        def some() -> bool:
            nonlocal left
            ended = MPI.Request.Testsome(requests)
            left = ended is not None
            if left and look is not None:
                look()
            return ended is None or bool(ended)

        with self.blame():
            while left:
                self.until(some, busy_s=busy_s)

    @contextlib.contextmanager
    def blame(self, kind: type[Exception] = MPI.Exception) -> Iterator[None]:
        """Turn errors of a `kind` into the loss of the rank that is to blame for them: ULFM tells of a loss by an error."""
        try:
            yield
        except kind:
            deadline = time.monotonic() + BLAME_S
            while time.monotonic() < deadline:
                self.check()
                time.sleep(CHECK_EVERY_S)
            raise


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
