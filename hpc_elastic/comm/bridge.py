"""The two ways in which the leader connects with a newcomer: by spawning, or with a launcher of the newcomer's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from mpi4py import MPI

from ..config import STDERR_VARIABLE
from ..errors import LaunchError
from ..rundir import RunDirectory
from .messages import parent_file, port_file
from .vendor import Vendor, find_mpiexec

PACKAGE = Path(__file__).parent.parent
# What a launcher sets for the rank that starts a newcomer, and that is not the newcomer's.
LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_UNIVERSE", "PRTE_LAUNCHED", "HYDI_", "MPI_LOCAL")


def without_session() -> dict[str, str]:
    """Return the environment without this rank's own session with its launcher."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}


def socket_of(run: RunDirectory, member: int) -> str:
    """Return where the guard of newcomer `member` waits for the handover."""
    return str(run.newcomers / f"{member}.sock")


def handover(run: RunDirectory, member: int) -> list[str]:
    """Return the program, after the Python, that makes newcomer `member` the process a launcher starts."""
    return ["-I", "-S", str(PACKAGE / "handover.py"), socket_of(run, member)]


class Bridge(Protocol):
    """How to connect with a newcomer that is warm.

    Attributes
    ----------
    at_once : bool
        Several threads may connect at a time.
    """

    at_once: bool

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Return the connection with newcomer `member`; returns when it has initialised MPI."""
        ...

    def give_up(self, run: RunDirectory, member: int) -> bool:
        """Let `connect` end with an error if newcomer `member` is known dead; True if that is done. For another thread."""
        ...


class Spawn:
    """The newcomer becomes a process of this rank's own launcher, by ``MPI_Comm_spawn``."""

    def __init__(self, vendor: Vendor) -> None:
        self.at_once = vendor.spawns_at_once

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Spawn the handover to newcomer `member`."""
        return MPI.COMM_SELF.Spawn(sys.executable, handover(run, member), maxprocs=1)

    def give_up(self, run: RunDirectory, member: int) -> bool:
        """Publish what the spawn waits for, where nobody can stand in for the newcomer: something that means nothing."""
        try:
            service = parent_file(run, member).read_text()
        except FileNotFoundError:
            return False
        MPI.Publish_name(service, "nobody.*")
        return True


class Join:
    """The newcomer gets a launcher of its own and calls this rank: the loss of its whole node reaches no other launcher."""

    at_once = False

    def __init__(self, vendor: Vendor) -> None:
        if not vendor.joins:
            raise LaunchError(f'arrival = "join" needs MPICH: {vendor.title} does not connect processes of two launchers')
        self._mpiexec, self._vendor = find_mpiexec()

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Start a launcher for the handover to newcomer `member`, and accept its call."""
        port = MPI.Open_port()
        file = port_file(run, member)
        file.write_text(port)
        command = [str(self._mpiexec), *self._vendor.launch, "-n", "1", sys.executable, *handover(run, member)]
        # A session of its own: what ends this rank's process group leaves it alone.
        stderr = int(os.environ.get(STDERR_VARIABLE, "2"))  # not through this rank's guard, which goes with it
        subprocess.Popen(command, env=without_session(), stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        try:
            return MPI.COMM_SELF.Accept(port)
        finally:
            file.unlink(missing_ok=True)
            MPI.Close_port(port)

    def give_up(self, run: RunDirectory, member: int) -> bool:  # noqa: ARG002  (the seam's)
        """Do nothing: somebody stands in for the newcomer."""
        return False
