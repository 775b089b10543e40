"""The TCP connections that MPI has with other hosts: one that breaks tells of a loss at once, before anything is sent there.

Where hosts are connected by TCP, MPICH crashes when it begins to send to a rank whose connection has broken. So it is looked
before each sum. MPI does not tell of its connections, but they are sockets of this process.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections.abc import Collection, Mapping

BROKEN = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Wires:
    """Watches the connections with some hosts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._wires: dict[int, tuple[int, str]] = {}  # own descriptor of a socket -> its inode and the host
        self._done: set[int] = set()  # inodes of sockets of which nothing is to be heard any more

    def scan(self, addresses: Mapping[str, str]) -> None:
        """Find the connections of this process with the hosts of these `addresses`, and forget those with others.

        Parameters
        ----------
        addresses : mapping of str to str
            The host of each address.
        """
        with self._lock:
            known = {inode for inode, _ in self._wires.values()} | self._done
        hosts = set(addresses.values())
        there = (int(entry.name) for entry in os.scandir("/proc/self/fd"))
        new = [found for found in there if (inode := _inode(found)) and inode not in known]
        for number in new:
            wire = _duplicate(number)
            if wire is not None and (host := addresses.get(_peer(wire))) is not None:
                descriptor = wire.detach()
                with self._lock:
                    self._wires[descriptor] = _inode(descriptor), host
                    self._poll.register(descriptor, BROKEN)
            elif wire is not None:
                wire.close()
        with self._lock:
            self._drop([wire for wire, (_, host) in self._wires.items() if host not in hosts])

    def broken(self) -> frozenset[str]:
        """Return the hosts with which a connection has broken."""
        if not self._wires:
            return frozenset()
        with self._lock:
            return frozenset(self._wires[wire][1] for wire, _ in self._poll.poll(0))

    def forget(self, hosts: Collection[str]) -> None:
        """Take no more notice of connections with `hosts` that have broken: it is known why."""
        with self._lock:
            self._drop([wire for wire, _ in self._poll.poll(0) if self._wires[wire][1] in hosts])

    def _drop(self, wires: list[int]) -> None:
        for wire in wires:
            self._done.add(self._wires.pop(wire)[0])
            self._poll.unregister(wire)
            os.close(wire)

    def close(self) -> None:
        """Take no more notice of any."""
        with self._lock:
            self._drop(list(self._wires))


def _inode(descriptor: int) -> int:
    """Return the inode of a descriptor that is a socket, else 0."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return 0
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else 0


def _duplicate(descriptor: int) -> socket.socket | None:
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None  # it is closed already
    try:
        return socket.socket(fileno=copy)
    except OSError:  # and its number is another file's
        os.close(copy)
        return None


def _peer(wire: socket.socket) -> str:
    """Return the address of the other side of a TCP connection, else nothing."""
    try:
        if wire.family in (socket.AF_INET, socket.AF_INET6) and wire.type == socket.SOCK_STREAM:
            return str(wire.getpeername()[0])
    except OSError:
        pass
    return ""
