"""Stdin, stdout and stderr, which may be closed, or read by nobody any more."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import IO, AnyStr

from .relay import GONE


def have_all() -> None:
    """Let stdin, stdout and stderr go nowhere where whoever started this process has closed them.

    Called before any file is opened, it sees to it that none takes the number of one of these, which children inherit.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # what has its number by now may be a file of the user's
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  (for as long as this process lasts)


def put(stream: IO[AnyStr], words: AnyStr) -> None:
    """Write `words` to `stream` at once. If nobody reads it any more, it goes nowhere from now on."""
    try:
        stream.write(words)
        stream.flush()
    except BlockingIOError:
        pass  # somebody has set it so; what is left in the stream's buffer goes with the next words
    except OSError as problem:
        with contextlib.suppress(OSError):
            _drain(stream, for_good=problem.errno in GONE)  # a disk that is full may have room again


def _drain(stream: IO[AnyStr], *, for_good: bool) -> None:
    """Let what is in the stream's buffer go nowhere: it would fail again, at the latest when the process ends.

    What other threads write there meanwhile goes nowhere, too.
    """
    number = stream.fileno()
    kept = os.dup(number)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
        stream.flush()
    finally:
        if not for_good:
            os.dup2(kept, number)
        os.close(kept)
