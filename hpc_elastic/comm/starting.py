"""How a newcomer's guard is started: as a child of the leader, or by the agent of a companion, through a file."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from .. import places
from ..config import STDERR_VARIABLE
from ..errors import LaunchError
from ..limits import why_not
from ..model import LOCALHOST, OWN, Member
from ..rundir import RunDirectory
from .messages import Options, options_file

PACKAGE = Path(__file__).parent.parent
HERE = os.uname().nodename
LEADER_VARIABLE = "_HPC_ELASTIC_LEADER"  # for a guard whose leader is on another host: the leader's number
LEADER_PID_VARIABLE = "_HPC_ELASTIC_LEADER_PID"  # for any other: the leader's pid
# What a launcher sets for the rank that starts a newcomer, and that is not the newcomer's.
LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE", "PRTE_LAUNCHED", "HYDI_", "MPI_LOCAL")
# What Slurm sets for a job that is not the companion's. SLURM_CONF is the cluster's.
SCHEDULER = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_")
CLUSTER = {"SLURM_CONF"}


class Guarded(Protocol):
    """A newcomer under its guard, as the leader can see and end it."""

    def poll(self) -> int | None:
        """Return None as long as it may be there."""
        ...

    def terminate(self) -> None:
        """End it, if it heeds that."""
        ...

    def kill(self, member: Member) -> None:
        """End it, whatever it does."""
        ...


class Near:
    """A newcomer on this host."""

    def __init__(self, guard: subprocess.Popen[bytes]) -> None:
        self._guard = guard
        self.poll = guard.poll
        self.terminate = guard.terminate

    def kill(self, member: Member) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)


class Afar:
    """A newcomer on a companion's host.

    Parameters
    ----------
    run : RunDirectory
        The run.
    member, companion : int
        Which newcomer, and where it is.
    """

    def __init__(self, run: RunDirectory, member: int, companion: int) -> None:
        self._run = run
        self._member = member
        self._companion = companion

    def poll(self) -> int | None:
        """Return None until its guard, or the companion's agent, says that it has ended."""
        end = self._run.end_of(self._member)
        if end is not None:
            return end.code
        return 1 if places.companion_file(self._run.path, self._companion, "end").exists() else None

    def terminate(self) -> None:
        """End it: its guard kills it, or the agent does not start it."""
        places.order_file(self._run.path, self._companion, self._member).unlink(missing_ok=True)
        self._run.condemn(self._member)

    def kill(self, member: Member) -> None:
        """End it, whatever it does."""
        self._run.condemn(member.id)


def without_session() -> dict[str, str]:
    """Return the environment without this rank's own session with its launcher."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}


def portable(environ: Mapping[str, str]) -> dict[str, str]:
    """Return those variables of `environ` that hold on another host, too."""
    foreign = (*SCHEDULER, STDERR_VARIABLE)
    return {key: value for key, value in environ.items() if key in CLUSTER or not key.startswith(foreign)}


def socket_of(run: RunDirectory, member: int) -> str:
    """Return where the guard of newcomer `member` waits for the handover."""
    return str(run.newcomers / f"{member}.sock")


def start(run: RunDirectory, options: Options) -> Guarded:
    """Start a newcomer under its guard. It gets nothing of this rank's own session with the launcher."""
    run.put(options_file(run, options.member), options)
    # -I -S: neither site-packages nor the environment's Python settings, so that the guard is there at once.
    guard = [sys.executable, "-I", "-S", str(PACKAGE / "guard.py"), "--warm", socket_of(run, options.member)]
    worker = [sys.executable, "-m", "hpc_elastic.worker", options.run_dir, str(options.member)]
    command = [*guard, options.run_dir, str(options.member), *worker]
    environ = without_session() | ({"CUDA_VISIBLE_DEVICES": options.gpus} if options.gpus else {})
    if options.companion == OWN and options.host in (LOCALHOST, socket.gethostname()):
        stderr = int(os.environ.get(STDERR_VARIABLE, "2"))  # not through this rank's guard, which goes with it
        environ[LEADER_PID_VARIABLE] = str(os.getpid())
        try:
            return Near(subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=stderr))
        except OSError as problem:
            text = f"newcomer {options.member} can't be started on {HERE}: {why_not(problem)}"
            raise LaunchError(text) from problem
    environ = portable(environ)
    environ[LEADER_VARIABLE] = str(options.leader.id)
    order = {"command": command, "environ": environ}
    run.put(places.order_file(run.path, options.companion, options.member), order)
    return Afar(run, options.member, options.companion)
