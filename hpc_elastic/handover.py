"""Handover: what the launcher starts for a newcomer. Run by path, with ``python -I -S``; imports next to nothing.

    python -I -S handover.py SOCKET

The newcomer is warm already, under its guard. This process brings it what the launcher gave it, the variables and the
descriptor of the PMI session, and then stands for it towards the launcher until it has ended.
"""

import _socket
import os
import sys

LAUNCHER = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "MPI_", "MPIR_")


def main() -> None:
    """Hand over, and wait for the newcomer's end."""
    path = sys.argv[1]
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    guard = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        guard.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    except OSError:
        # The newcomer is gone. The leader's MPI_Comm_spawn ends only when somebody has come: be the one, and leave again.
        os.execv(sys.executable, [sys.executable, "-c", "from mpi4py import MPI; MPI.Comm.Get_parent().Free()"])  # noqa: S606
    variables = b"\0".join(os.fsencode(f"{k}={v}") for k, v in os.environ.items() if k.startswith(LAUNCHER))
    session = os.environ.get("PMI_FD")
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, int(session).to_bytes(4, sys.byteorder))] if session else []
    guard.sendmsg([variables], rights)
    code = guard.recv(1)
    os._exit(code[0] if code else 137)


main()
