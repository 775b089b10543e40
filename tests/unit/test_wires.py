"""Connections of this process that somebody else opened, and that break: with real sockets."""

from __future__ import annotations

import os
import socket

import pytest

from hpc_elastic.comm.wires import Wires

PEER = {"127.0.0.2": "peer"}


@pytest.fixture
def pair():
    """A connection: the end that a library holds here, and the other one."""
    with socket.create_server(("127.0.0.2", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            yield near, far


@pytest.fixture
def wires():
    made = Wires()
    before = sum(1 for _ in os.scandir("/proc/self/fd"))
    yield made
    made.close()
    assert sum(1 for _ in os.scandir("/proc/self/fd")) <= before


def test_one_that_breaks(wires, pair):
    wires.scan(PEER)
    assert not wires.broken()
    pair[1].close()
    assert wires.broken() == {"peer"}
    wires.forget({"another"})
    assert wires.broken() == {"peer"}
    wires.forget({"peer"})
    wires.scan(PEER)
    assert not wires.broken(), "it is not found again"


def test_one_that_the_library_has_closed_since(wires, pair):
    """Its number may be another file's by now."""
    wires.scan(PEER)
    pair[1].close()
    pair[0].close()
    assert wires.broken() == {"peer"}


def test_data_is_no_break(wires, pair):
    wires.scan(PEER)
    pair[1].sendall(b"x" * 100)
    assert not wires.broken()
    assert pair[0].recv(100) == b"x" * 100


def test_connections_with_others(wires, pair):
    wires.scan({"192.0.2.1": "peer"})
    pair[1].close()
    assert not wires.broken()


def test_hosts_that_are_left(wires, pair):
    wires.scan(PEER)
    wires.scan({})
    pair[1].close()
    assert not wires.broken()
