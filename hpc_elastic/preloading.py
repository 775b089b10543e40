"""Imports the modules of others without MPI, at low priority, and sees whether threads are left that a fork would lose."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from .warmth import MPI

NICENESS = 5  # a quarter of a core that is busy
SETTLE_S = 1.0


class MpiRefused(BaseException):
    """A module wants MPI: not here. No `Exception`, which a module may catch and then believe that there is none."""


class NoMpi(importlib.abc.MetaPathFinder):
    """Refuses MPI, and knows whether anybody wanted it."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        """Raise for MPI; other modules are found by others."""
        if name == MPI:
            raise MpiRefused
        return None


def preload(names: Iterable[str]) -> dict[str, str]:
    """Import the modules `names`; return why some could not be, by name."""
    problems, refusing = {}, NoMpi()
    sys.meta_path.insert(0, refusing)
    for name in names:
        before = set(sys.modules)
        try:
            importlib.import_module(name)
        except MpiRefused:
            top = name.partition(".")[0]
            for new in [new for new in sys.modules if new not in before and new.partition(".")[0] == top]:
                del sys.modules[new]  # as if nobody had tried
        except BaseException as problem:  # noqa: BLE001  (user-installed code; the newcomer will see for itself)
            problems[name] = f"{type(problem).__name__}: {problem}"
    sys.meta_path.remove(refusing)
    return problems


def preload_gently(names: Iterable[str]) -> dict[str, str]:
    """Do that in a thread of low priority. In Linux every thread has its own, and only it gets slow."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    return preload(names)


def threads() -> int:
    """Return the number of this process's threads that a fork would not take along, besides this one.

    Libraries that end their threads before a fork, as OpenBLAS does, have none after one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + SETTLE_S
    while left := len(list(Path("/proc/self/task").iterdir())) - 1:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)  # one that has ended is to be seen for a moment
    return left
