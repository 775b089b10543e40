"""Which hosts can be reached: a host that refuses a connection has answered, so nobody has to listen there."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Collection, Mapping
from typing import Any

PORT = 9  # discard, where hardly anybody listens; who does answers as well
LIMIT_S = 1.0
Address = tuple[int, Any]  # family, and what goes with it


class Reach:
    """Asks hosts, and remembers those that have ever answered: of the others, behind firewalls, nothing can be said.

    Attributes
    ----------
    hosts : dict of str to str
        The hosts that were asked, by their addresses.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, str] = {}
        self._addresses: dict[str, Address] = {}
        self._tried: set[str] = set()

    def learn(self, hosts: Collection[str]) -> None:
        """Find out which of `hosts` answer, as long as all is well. Each is asked once."""
        new = set(hosts) - self._tried
        self._tried |= new
        found = {}
        for host in new:
            try:
                family, _, _, _, address = socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)[0]
            except OSError:
                continue
            found[host] = int(family), address
            self.hosts[str(address[0])] = host
        answered = _answering(found)
        self._addresses |= {host: where for host, where in found.items() if host in answered}

    def cut_off(self, hosts: Collection[str]) -> set[str]:
        """Return those of `hosts` that have answered before and don't now."""
        known = {host: self._addresses[host] for host in hosts if host in self._addresses}
        return known.keys() - _answering(known)


def _answering(addresses: Mapping[str, Address]) -> set[str]:
    """Return the hosts that answer within `LIMIT_S` seconds."""
    found, poll = set[str](), select.poll()
    with contextlib.ExitStack() as lines:
        asked: dict[int, tuple[str, socket.socket]] = {}
        for host, (family, address) in addresses.items():
            line = lines.enter_context(socket.socket(family, socket.SOCK_STREAM))
            line.setblocking(False)
            line.connect_ex(address)
            asked[line.fileno()] = host, line
            poll.register(line, select.POLLOUT)
        deadline = time.monotonic() + LIMIT_S
        # Who was stopped itself meanwhile looks once more: the answers are there.
        while asked and (ready := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
            for descriptor, _ in ready:
                host, line = asked.pop(descriptor)
                poll.unregister(descriptor)
                if line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNREFUSED):
                    found.add(host)
    return found
