"""The two ways in which the leader connects with a newcomer: by spawning, or with a launcher of the newcomer's own."""

from __future__ import annotations

import subprocess
import sys
from typing import Protocol

from mpi4py import MPI

from ..errors import LaunchError
from ..rundir import RunDirectory
from .messages import port_file
from .starting import PACKAGE, socket_of, without_session
from .vendor import Vendor, find_mpiexec


def handover(run: RunDirectory, member: int) -> list[str]:
    """Return the program, after the Python, that makes newcomer `member` the process a launcher starts."""
    return ["-I", "-S", str(PACKAGE / "handover.py"), socket_of(run, member)]


class Bridge(Protocol):
    """How to connect with a newcomer that is warm. One connects at a time."""

    def launcher(self, run: RunDirectory, member: int) -> list[str]:
        """Return the command of the launcher that newcomer `member` starts for itself when it is called, or nothing."""
        ...

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Return the connection with newcomer `member`; returns when it has initialised MPI."""
        ...

    def give_up(self, run: RunDirectory, member: int) -> bool:
        """Have `connect` come to an end: newcomer `member` is gone. False if that can't be done yet, or need not."""
        ...


class Spawn:
    """The newcomer becomes a process of this rank's own launcher, by ``MPI_Comm_spawn``."""

    def launcher(self, run: RunDirectory, member: int) -> list[str]:  # noqa: ARG002
        """Return nothing: this rank's launcher starts it."""
        return []

    def give_up(self, run: RunDirectory, member: int) -> bool:
        """End the call where nobody can stand in, on Open MPI, by publishing what it waits for: who has come."""
        file = run.newcomers / f"{member}.parent"
        if not file.exists():
            return False
        service = file.read_text()
        file.unlink()
        # All ranks of somebody, without saying how many: an error that the call returns. Without the dot it would crash.
        MPI.Publish_name(service, "nobody.*")
        return True

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Spawn the handover to newcomer `member`."""
        return MPI.COMM_SELF.Spawn(sys.executable, handover(run, member), maxprocs=1)


class Join:
    """The newcomer gets a launcher of its own and calls this rank: the loss of its whole node reaches no other launcher."""

    def __init__(self, vendor: Vendor) -> None:
        if not vendor.joins:
            raise LaunchError(f'arrival = "join" needs MPICH: {vendor.title} does not connect processes of two launchers')
        mpiexec, vendor = find_mpiexec()
        self._mpiexec = [str(mpiexec), *vendor.launch, "-n", "1"]

    def launcher(self, run: RunDirectory, member: int) -> list[str]:
        """Return the launcher of the handover to newcomer `member`, which starts it itself, on its own host."""
        return [*self._mpiexec, sys.executable, *handover(run, member)]

    def connect(self, run: RunDirectory, member: int) -> MPI.Intercomm:
        """Accept the call of newcomer `member`."""
        port = MPI.Open_port()
        file, beside = port_file(run, member), port_file(run, member).with_suffix(".unread")
        beside.write_text(port)
        beside.rename(file)
        try:
            return MPI.COMM_SELF.Accept(port)
        finally:
            file.unlink(missing_ok=True)
            MPI.Close_port(port)

    def give_up(self, run: RunDirectory, member: int) -> bool:
        """Call in place of a newcomer that is gone."""
        stand_in = [sys.executable, "-I", "-S", str(PACKAGE / "handover.py"), "--stand-in", socket_of(run, member)]
        # A session of its own: what ends this rank's process group leaves it alone.
        subprocess.Popen(
            [*self._mpiexec, *stand_in], env=without_session(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        return True
