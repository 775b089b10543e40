"""A lock that says that somebody is there, until a file is closed, if by the kernel; and a look whether it is taken."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO


def take(path: Path) -> IO[bytes] | None:
    """Take the lock at `path`, until the file that is returned is closed; None if somebody has it."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    with contextlib.suppress(OSError):  # a file system without locks: nobody can know, then
        while not _locked(file.fileno(), fcntl.LOCK_EX):
            # Who only looks shares the lock, and for a moment; who has taken it does not.
            if not _locked(file.fileno(), fcntl.LOCK_SH):
                file.close()
                return None
    return file


def is_taken(path: Path) -> bool:
    """Tell whether somebody has the lock at `path`, or might have it. Nobody is kept from taking it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as problem:
        return not isinstance(problem, FileNotFoundError)
    try:
        return not _locked(descriptor, fcntl.LOCK_SH)
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _locked(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
