"""Tests that run alone and under mpiexec: `test_under_mpiexec.py` starts the others again on 2 and 3 ranks.

A verdict is gathered from all ranks, so that every rank fails where one does, instead of waiting for it.
"""

from __future__ import annotations

import atexit
import os

import pytest

from hpc_elastic.runtime.launch import import_mpi

UNDER_MPIEXEC = "TESTS_UNDER_MPIEXEC"

# Whoever collects the tests here imports MPI, which begins it, though it may run none of them.
import_mpi()


@atexit.register
def _end_mpi():
    from hpc_elastic.comm.world import finalize

    finalize()


@pytest.fixture(scope="session")
def world():
    """The ranks."""
    from hpc_elastic.comm.waiting import Watch
    from hpc_elastic.comm.world import World

    return World.of_seeds(Watch())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Let a test fail on every rank if it fails on one."""
    if "world" not in pyfuncitem.funcargs:
        return (yield)
    error = None
    try:
        yield
    except BaseException as problem:  # noqa: BLE001  (told to the others, and raised below)
        error = problem
    told = pyfuncitem.funcargs["world"].gather_all(repr(error).encode() if error else b"")
    if error is not None:
        raise error
    failed = {rank: text.decode() for rank, text in enumerate(told) if text}
    if failed:
        pytest.fail(f"failed on other ranks: {failed}")
    return True


def pytest_collection_modifyitems(items):
    """Don't start mpiexec below mpiexec."""
    if UNDER_MPIEXEC in os.environ:
        items[:] = [item for item in items if "world" in item.fixturenames]
