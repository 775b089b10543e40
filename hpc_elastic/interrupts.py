"""Signals by which people and schedulers end a job; and a wait that they, and the end of a child, cut short."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import TracebackType
from typing import Any, Self

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
URGENT = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Notes the signals that come while its block lasts. Who acts on them looks: a handler could come at any moment.

    Attributes
    ----------
    first : str
        Name of the first signal, or empty.
    again : str
        Name of a SIGINT or SIGTERM after it, or empty.
    """

    def __init__(self) -> None:
        self.first = self.again = ""

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # nohup has SIGHUP ignored, and means it.
        caught = [n for n in CAUGHT if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in caught}
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def _note(self, number: int, _frame: Any) -> None:
        if not self.first:
            self.first = signal.Signals(number).name
        elif number in URGENT:
            self.again = signal.Signals(number).name

    def wait(self, seconds: float) -> None:
        """Wait for `seconds`, or until a signal comes or a child ends."""
        select.select([self._reader], [], [], max(seconds, 0.0))
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
