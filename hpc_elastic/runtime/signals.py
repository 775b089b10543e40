"""What signals mean to a rank: SIGTERM, leave the job; Ctrl-C, stop it at the next step, and at once when it comes twice.

Under a supervisor Ctrl-C reaches the supervisor, not the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..model import Request
from ..rundir import RunDirectory

SAME_S = 0.5

Handler = Callable[[int, FrameType | None], Any] | int | None


@contextlib.contextmanager
def heeded(run: RunDirectory, member: int) -> Iterator[None]:
    """Heed signals inside a ``with`` block, as far as the script has no handlers of its own.

    Parameters
    ----------
    run : RunDirectory
        Where the leader is asked.
    member : int
        Number of this process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Handler] = {}

    def leave(_number: int, _frame: FrameType | None) -> None:
        _ask(run, Request("leave", member))

    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if first:
            # The terminal, the launcher and the guard all deliver one Ctrl-C.
            if time.monotonic() - first[0] > SAME_S:
                signal.default_int_handler(number, frame)
            return
        first.append(time.monotonic())
        how = "stopping at the next step, with a checkpoint; " if _ask(run, Request("stop")) else ""
        _say(f"{how}Ctrl-C again ends it now")

    meanings: list[tuple[int, Handler, Handler]] = [
        (signal.SIGTERM, signal.SIG_DFL, leave),
        (signal.SIGINT, signal.default_int_handler, stop),
    ]
    for number, default, handler in meanings:
        if signal.getsignal(number) is default:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(run: RunDirectory, request: Request) -> bool:
    """Ask the leader, or say why that can't be done."""
    try:
        run.ask(request)
    except OSError as error:
        _say(f"the leader can't be asked to {request.kind}: {error.strerror}")
        return False
    return True


def _say(text: str) -> None:
    """Say something in a handler: the process may be in the midst of printing, and nobody may be there to read it."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"hpc_elastic: {text}\n".encode())
