"""How a companion is got from Slurm: at once, by salloc and a starter; or by sbatch, when the scheduler comes to it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from ...errors import SlurmError, SlurmUnreachable
from ...model import OWN
from ...places import companion_name
from . import text
from .calls import environment

if TYPE_CHECKING:
    from .companions import Asked, Files
    from .reading import Slurm

PACKAGE = Path(__file__).parent.parent.parent
PYTHON = (sys.executable, "-I", "-S")  # neither site-packages nor the environment's Python settings: there at once
QUIET_S = 30.0  # without a sign of life of any rank, a companion ends itself
TRIES_FOR_S = 60.0  # how long an order is tried while Slurm can't be reached


def agent(run_path: Path, number: int, *options: str) -> list[str]:
    """Return the command of a companion's agent."""
    return [*PYTHON, str(PACKAGE / "agent.py"), *options, str(run_path), companion_name(number), f"{QUIET_S:g}"]


def own_agent(run_path: Path) -> list[str]:
    """Return the command of the agent of the job's own host, which starts ranks there if the leader is elsewhere."""
    return agent(run_path, OWN)


class Getting(Protocol):
    """A way to get companions."""

    def get(self, number: int, asked: Asked, options: Sequence[str], known: Callable[[int], int | None]) -> None:
        """Ask Slurm for companion `number`; `known` looks for an allocation of it in the queue. What comes stands in files.

        Raises
        ------
        SlurmUnreachable
            If another try is worth while.
        """
        ...


class AtOnce:
    """By ``salloc``: a node that is idle is there within milliseconds.

    Parameters
    ----------
    run_path : Path
        The run directory.
    files : Files
        The companions' files.
    patience_s : float
        How long a request may be pending.
    """

    def __init__(self, run_path: Path, files: Files, patience_s: float) -> None:
        self._run_path = run_path
        self._files = files
        self._patience_s = patience_s

    def get(self, number: int, asked: Asked, options: Sequence[str], known: Callable[[int], int | None]) -> None:  # noqa: ARG002
        """Start a starter, which outlives this process."""
        own = [*PYTHON, str(PACKAGE / "starter.py"), str(self._run_path), str(number), f"{2 * self._patience_s:g}"]
        command = [*own, *agent(self._run_path, number, "--step"), "--", *options]
        null = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=subprocess.PIPE, env=environment(), start_new_session=True
        )
        try:
            threading.Thread(target=self._wait, args=(number, process), name=f"companion {number}", daemon=True).start()
        except RuntimeError as problem:  # too many of this user's are there
            process.terminate()
            raise SlurmError(str(problem)) from problem

    def _wait(self, number: int, process: subprocess.Popen[bytes]) -> None:
        _, said = process.communicate()
        # One that was killed may have left an allocation, or an agent that runs: who looks after companions sees to it.
        if process.returncode > 0 and not self._files.path(number, "release").exists():
            self._files.end(number, str(text.refusal("salloc", said.decode(errors="replace"), process.returncode)))


class Queued:
    """By ``sbatch``: the companion ends with its script from birth, and begins when the scheduler comes to it."""

    def __init__(self, run_path: Path, files: Files, slurm: Slurm) -> None:
        self._run_path = run_path
        self._files = files
        self._slurm = slurm

    def get(self, number: int, asked: Asked, options: Sequence[str], known: Callable[[int], int | None]) -> None:
        """Submit the agent as a batch script."""
        script = f"#!/bin/sh\nexec {shlex.join(agent(self._run_path, number))}\n"
        options = [*options, "--no-requeue", f"--output={self._files.path(number, 'out')}"]
        # After an answer that did not come, the job may exist all the same.
        allocation = known(number) or 0
        try:
            allocation = allocation or self._slurm.submit(script, options)
        except SlurmUnreachable as problem:
            if time.time() - asked.time > TRIES_FOR_S:
                self._files.end(number, str(problem))
            raise
        except SlurmError as problem:
            self._files.end(number, str(problem))
            raise
        self._files.ask(number, msgspec.structs.replace(asked, allocation=allocation))
