"""Memory that processes of one host share: files without a name, which are gone with the last process that maps them."""

from __future__ import annotations

import itertools
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

from ..errors import MembershipError

Bytes = NDArray[np.uint8]
PAGE_BYTES = mmap.PAGESIZE
_serials = itertools.count(1)


class Segment:
    """Memory of this process that others can map.

    Attributes
    ----------
    serial : int
        Its number in this process; descriptors are used again, these numbers are not.
    descriptor : int
        Under which other processes find it, as ``/proc/PID/fd/N``.
    bytes : numpy.ndarray, uint8
        The memory. It is larger after `grow`; what was taken from it before stays valid, and is the same memory.
    """

    def __init__(self) -> None:
        self.serial = next(_serials)
        try:
            self.descriptor = os.memfd_create("hpc_elastic", os.MFD_CLOEXEC)
        except OSError as error:
            raise MembershipError(f"no memory that ranks share: {error.strerror}") from error
        weakref.finalize(self, os.close, self.descriptor)
        self.bytes: Bytes = np.empty(0, np.uint8)

    def grow(self, nbytes: int) -> None:
        """Have at least `nbytes` bytes.

        Raises
        ------
        MembershipError
            If the host does not have so much memory.
        """
        if nbytes <= len(self.bytes):
            return
        whole = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        try:
            # Taken now: what is not there when it is touched would end the process (SIGBUS).
            os.posix_fallocate(self.descriptor, len(self.bytes), whole - len(self.bytes))
            self.bytes = np.frombuffer(mmap.mmap(self.descriptor, whole), np.uint8)
        except OSError as error:
            raise MembershipError(
                f"no memory for sums, {whole >> 20} MiB on this rank: {error.strerror}; run fewer ranks on a host"
            ) from error


def mapped(pid: int, descriptor: int, nbytes: int, *, writable: bool = False) -> Bytes:
    """Return the memory of process `pid` of this host.

    Raises
    ------
    OSError
        If the process can't be reached, or has no such segment.
    """
    opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY))
    try:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        return np.frombuffer(mmap.mmap(opened, nbytes, access=access), np.uint8)
    except ValueError as error:  # it is shorter than that
        raise OSError(str(error)) from error
    finally:
        os.close(opened)
