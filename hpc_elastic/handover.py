"""Handover: what the launcher starts for a newcomer. Run by path, with ``python -I -S``; imports next to nothing.

    python -I -S handover.py SOCKET
    python -I -S handover.py --stand-in SOCKET     for a newcomer that is gone, and could not start its launcher

The newcomer is warm already, under its guard. This process brings it what the launcher gave it, the variables and the
descriptor of the PMI session, and then stands for it towards the launcher until it has ended. If it ends before MPI_Init has
returned, somebody stands in for it there, so that the leader's MPI_Comm_spawn (or MPI_Comm_accept) returns, or the leader is
told how to end it.
"""

import _socket
import os
import select
import sys
import time

LAUNCHER = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "MPI_", "MPIR_")
LEAVE = b"\0"
WITHOUT_GUARD_S = 1.0  # more than a rank takes to notice that its guard is gone
STAND_IN = """
import sys
from mpi4py import MPI
parent = MPI.Comm.Get_parent()
if parent == MPI.COMM_NULL:
    parent = MPI.COMM_SELF.Connect(open(sys.argv[1]).read())
parent.Free()
"""


def main() -> None:
    """Hand over, and wait for the newcomer's end."""
    path = sys.argv[-1]
    if sys.argv[1] == "--stand-in":
        stand_in(path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    guard = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    variables = b"\0".join(os.fsencode(f"{k}={v}") for k, v in os.environ.items() if k.startswith(LAUNCHER))
    session = os.environ.get("PMI_FD")
    # Its stdout and stderr too: those of the leader, which the newcomer had so far, end with the leader.
    descriptors = b"".join(int(n).to_bytes(4, sys.byteorder) for n in ("1", "2", *([session] if session else [])))
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)]
    try:
        guard.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        guard.sendmsg([variables], rights)
    except OSError:
        stand_in(path)
    try:
        answer = guard.recv(2)
    except OSError:
        answer = b""
    if not answer and session:
        # The guard was killed. The newcomer ends itself then; its session is closed here, so that the job can go on.
        time.sleep(WITHOUT_GUARD_S)
        try:
            os.write(int(session), b"cmd=finalize\n")
            select.select([int(session)], [], [], WITHOUT_GUARD_S)
        except OSError:
            pass
        os._exit(0)
    if not answer:
        tell_the_leader(path)
        os._exit(0)
    if answer[:1] == LEAVE:
        os._exit(answer[1])
    stand_in(path)


def tell_the_leader(path: str) -> bool:
    """Let the leader give its call up, on Open MPI, where it can: it needs the name of the service that it waits for."""
    port, stem = os.environ.get("OMPI_PARENT_PORT"), path.removesuffix(".sock")
    if port is None:
        return False
    beside = os.path.join(os.path.dirname(stem), f".{os.path.basename(stem)}.parent.{os.getpid()}")
    try:
        with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(port + ":connect")
        os.rename(beside, stem + ".parent")
    except OSError:
        pass  # the run directory may be gone
    return True


def stand_in(path: str) -> None:
    """Take the newcomer's place in MPI_Init."""
    # The newcomer is gone, and MPI_Init had not returned. The leader's call ends only when somebody has come: be the one
    # and leave again. Open MPI lets nobody in for a process that has come once.
    if tell_the_leader(path):
        os._exit(0)
    stem = path.removesuffix(".sock")
    guard_py = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guard.py")
    command = [sys.executable, "-c", STAND_IN, stem + ".port"]
    os.execv(sys.executable, [sys.executable, "-I", "-S", guard_py, "--stand-in", *command])  # noqa: S606


main()
