"""Guard: starts one rank as its child and outlives it. Run by path, with ``python -I -S``; imports nothing of the package.

    python -I -S guard.py RUN MEMBER COMMAND...               a seed rank, under its launcher
    python -I -S guard.py --warm SOCKET RUN MEMBER COMMAND... a newcomer, which warms up before it has a launcher

MPICH's launcher ends the whole job when a process that it started is gone without closing its PMI session. So each rank has
a guard, which closes the session in the place of a rank that died. The death is written to the run directory, where the
other ranks see it. A newcomer's guard waits at SOCKET for `handover.py`, which the launcher starts when the newcomer is
wanted and which brings it what the launcher gave: variables, and the descriptor of the PMI session.
"""

from __future__ import annotations

import _socket
import os
import select
import signal
import sys
import time

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
DOOR = "HPC_ELASTIC_DOOR"
LOOK_S = 0.5
GRACE_S = 3.0
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
LARGEST = 1 << 18  # bytes that handover.py sends at most


def close_pmi_session(descriptor: int) -> None:
    """Say to the launcher that this process is finished, as the dead rank can't any more (PMI-1 wire protocol)."""
    try:
        os.write(descriptor, b"cmd=finalize\n")
        os.read(descriptor, 1024)
    except OSError:
        pass


def record_death(run: str, member: int, pid: int, how: str) -> None:
    """Write the run's failure, unless a rank has written one."""
    import json  # only now: a rank that ends well should not pay for it

    host = os.uname().nodename
    error = f"process {member} (pid {pid} on {host}) {how}"
    beside = os.path.join(run, f".failure.guard.{os.getpid()}")
    failure = {"error": error, "traceback": "", "member": member, "rank": -1, "host": host, "generation": -1, "step": -1}
    try:
        with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            json.dump(failure, file)
        try:
            os.link(beside, os.path.join(run, "failure.json"))
        except FileExistsError:
            pass
        os.unlink(beside)
    except OSError as problem:
        sys.stderr.write(f"hpc_elastic guard: {error}; could not be recorded in {run}: {problem}\n")


def end(pid: int) -> None:
    """End the rank, which may not heed SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        try:
            os.kill(pid, number)
            while number == signal.SIGTERM and time.monotonic() < deadline and os.waitid(os.P_PID, pid, ENDED) is None:
                time.sleep(0.02)
        except (ProcessLookupError, ChildProcessError):
            return


def left_well(run: str, member: str) -> bool:
    """Tell whether the rank says of itself that it was done with the job."""
    try:
        with open(os.path.join(run, "ranks", member + ".json"), encoding="utf-8") as file:
            record = file.read()
    except OSError:
        return False
    return any(f'"outcome":"{outcome}"' in record for outcome in ("retired", "cancelled", "ended"))


def pass_signals_on(pid: int, *, joined: bool) -> None:
    """Pass signals to the guard on to the rank; one that has not joined the job is ended for good by SIGTERM."""

    def handle(number: int, _: object) -> None:
        if number == signal.SIGTERM and not joined:
            end(pid)
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended

    for number in FORWARDED:
        signal.signal(number, handle)


def start(command: list[str], *, joined: bool) -> int:
    """Start the rank and return its pid."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a signal that comes now waits for the handlers
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        try:
            os.execvp(command[0], command)  # noqa: S606  (a shell is just what it must not be)
        except OSError as problem:
            sys.stderr.write(f"hpc_elastic guard: {command[0]}: {problem.strerror}\n")
            os._exit(127)
    pass_signals_on(pid, joined=joined)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    return pid


def hand_on(listener: _socket.socket, door: _socket.socket, pid: int, run: str) -> tuple[_socket.socket | None, int | None]:
    """Wait for handover.py and hand its gifts on to the rank; return its connection and the PMI descriptor, or None."""
    child = os.pidfd_open(pid)
    ready: list[int] = []
    while not ready:
        ready, _, _ = select.select([listener.fileno(), child], [], [], LOOK_S)
        if not ready and (os.path.exists(os.path.join(run, "failure.json")) or not os.path.isdir(run)):
            end(pid)  # nobody will come any more
    os.close(child)
    if listener.fileno() not in ready:
        return None, None
    caller = _socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]  # noqa: SLF001
    data, ancillary, _, _ = caller.recvmsg(LARGEST, 1024)
    door.sendmsg([data], ancillary)
    descriptors = [int.from_bytes(item[2][:4], sys.byteorder) for item in ancillary]
    return caller, descriptors[0] if descriptors else None


def main() -> None:
    """Be the guard of one rank."""
    arguments = sys.argv[1:]
    caller: _socket.socket | None = None
    session: int | None = int(os.environ.get("PMI_FD", "-1"))
    if arguments[0] == "--warm":
        _, path, run, member, *command = arguments
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        # The way through /proc is short, however long the run directory's name is: a socket's has 107 bytes at most.
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        listener.listen(1)
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        os.set_inheritable(theirs.fileno(), True)
        os.environ[DOOR] = str(theirs.fileno())
        pid = start(command, joined=False)
        theirs.close()
        caller, session = hand_on(listener, ours, pid, run)
        listener.close()
        try:
            os.unlink(path)
        except OSError:
            pass  # the run directory may be gone
        joined = caller is not None
        pass_signals_on(pid, joined=joined)
    else:
        run, member, *command = arguments
        pid = start(command, joined=True)
        joined = True
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0 and joined and not left_well(run, member):
        names = {number.value: number.name for number in signal.Signals}  # most real-time signals have none
        how = (
            f"was killed by signal {-code} ({names.get(-code, 'real-time')})" if code < 0 else f"ended with exit code {code}"
        )
        record_death(run, int(member), pid, how)
        if session is not None and session >= 0:
            close_pmi_session(session)
    verdict = code if code >= 0 else 128 - code
    if caller is not None:
        try:
            caller.send(bytes([verdict]))
        except OSError:
            pass
    os._exit(verdict)


main()
