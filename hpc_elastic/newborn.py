"""What a process forked by a warm parent does to be as one that was started: descriptors, variables, signals, randomness."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .config import DOOR_VARIABLE, START_VARIABLE, STDERR_VARIABLE
from .warmth import Asked, Spec

WORKER = "hpc_elastic.worker"
LONGEST_S = 30  # to rehearse
OWN_STREAMS = 2  # stdout and stderr; what else is sent has a variable with its number


@dataclass
class Newborn:
    """What it is to be: what was `asked` for, the `descriptors` sent along, and how signals were set."""

    asked: Asked
    descriptors: list[int]
    dispositions: Mapping[signal.Signals, Any]


def get_ready(spec: Spec) -> None:
    """Do ahead what any newcomer does: import what needs MPI, and rehearse what costs once a process."""
    begun = time.monotonic()
    for name in (WORKER, *(name for name in spec.modules if name.startswith(f"{__package__}."))):
        with contextlib.suppress(Exception):  # the newcomer says it, when it does that itself
            importlib.import_module(name)
    signal.alarm(LONGEST_S)  # nobody has anything of one that hangs
    for name, arguments in spec.rehearsals.items():
        try:
            importlib.import_module(name).rehearse(**arguments)
        except Exception as problem:  # noqa: BLE001  (the newcomer does without)
            print(f"not rehearsed: {name}: {type(problem).__name__}: {problem}", flush=True)
    signal.alarm(0)
    gc.collect()
    gc.freeze()
    print(f"a process waits, ready after {time.monotonic() - begun:.1f} s", flush=True)


def be_born(newborn: Newborn) -> None:
    """Be a newcomer: leave behind what was the parent's, and run the worker."""
    asked = newborn.asked
    for number, disposition in newborn.dispositions.items():
        signal.signal(number, disposition)
    stdout, stderr, *others = newborn.descriptors
    for descriptor, place in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked.environ)
    for name, descriptor in zip((STDERR_VARIABLE, DOOR_VARIABLE), others, strict=True):
        os.environ[name] = str(descriptor)
    os.environ[START_VARIABLE] += " warm"
    os.umask(asked.umask)
    os.chdir(asked.directory)
    reseed()
    sys.argv[:] = [WORKER, *asked.arguments]
    sys.modules["__main__"] = ModuleType("__main__")
    from .worker import main

    main()


def reseed() -> None:
    """Have random numbers of its own: all children of one parent would draw the same ones."""
    random.seed()
    numpy_seed: Callable[[], None] | None = getattr(sys.modules.get("numpy.random"), "seed", None)
    if numpy_seed is not None:
        numpy_seed()
