"""Notices that the main thread is stuck inside a call of MPI's: one that should return at once, but waits for MPI's lock."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from .. import comm

FOLDER = str(Path(comm.__file__).parent)
WAITS = "until"  # the loop that waits, which can always be left


class Stuck:
    """Looks at where the main thread is, from another one; costs the main thread nothing.

    A call of MPI's shows as a frame of `hpc_elastic.comm` that stays at one instruction.
    """

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._seen: tuple[int, int] | None = None
        self._since = 0.0

    def seconds(self) -> float:
        """Return for how long the main thread has been inside one call of MPI's, as far as it was looked at."""
        frame = sys._current_frames().get(self._main or 0)  # noqa: SLF001  (there is no other way)
        now = time.monotonic()
        if frame is None or not frame.f_code.co_filename.startswith(FOLDER) or frame.f_code.co_name == WAITS:
            self._seen = None
            return 0.0
        if self._seen != (place := (id(frame), frame.f_lasti)):
            self._seen, self._since = place, now
        return now - self._since
