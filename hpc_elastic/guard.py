"""Guard: starts one rank as its child and outlives it. Run by path, with ``python -I -S``; imports nothing of the package.

    python -I -S guard.py RUN MEMBER COMMAND...               a seed rank, under its launcher
    python -I -S guard.py --warm SOCKET RUN MEMBER COMMAND... a newcomer, which warms up before it has a launcher
    python -I -S guard.py --stand-in COMMAND...               who takes a newcomer's place in MPI_Init, for `handover.py`

A guard judges nothing. It writes down how its rank ended, in ``RUN/ranks/MEMBER.end.json``, with the last words from the
rank's stderr, which goes through its hands; and it keeps the launcher calm, so that the other ranks can go on. MPICH's ends
the job when the connection of a rank (PMI) breaks off: the guard holds it too, and closes it properly in the end. Open MPI's
ends the job when a process that it started ends with another code than 0: so the guard ends with 0. That a rank is lost,
Open MPI's launcher knows from a connection of its own with it, and tells the others.

A newcomer's guard waits at SOCKET for `handover.py`, which the launcher starts when the newcomer is wanted, and which brings
it what the launcher gave: variables, and the descriptor of the PMI session. A rank is killed when ``RUN/condemned/MEMBER``
is there, and a newcomer when the leader that started it is gone and it does not become a member: nobody else will call it.
The leader is the guard's parent, whose pid is in the environment, as it may be gone by now; or it is on another host, and
its number is there.

If this host has a warm parent (`hpc_elastic.warm`), a newcomer's guard asks that to fork the newcomer, instead of starting
it itself (`adoption.py`). Only the parent gets to know how it has ended, so it is asked for that as well.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import signal
import sys
import time

if __package__:
    from . import adoption, limits
else:  # run by path: so is what lies beside this file loaded, faster than by importlib
    from _frozen_importlib_external import SourceFileLoader

    adoption, limits = type(sys)("adoption"), type(sys)("limits")
    for module in (adoption, limits):
        module.__file__ = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{module.__name__}.py")
        SourceFileLoader(module.__name__, module.__file__).exec_module(module)

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
DOOR, STDERR, LEADER = "HPC_ELASTIC_DOOR", "_HPC_ELASTIC_STDERR", "_HPC_ELASTIC_LEADER"
LEADER_PID, GUARD = "_HPC_ELASTIC_LEADER_PID", "_HPC_ELASTIC_GUARD"
START = "_HPC_ELASTIC_START"  # tells a newcomer since when it is being started, how, and why not by a fork
LOOK_S, GRACE_S, STAND_IN_S = 0.25, 3.0, 10.0
SETTLE_S, ANSWER_S = 0.02, 2.0  # how long the launcher may take for an answer under way, and for any
LARGEST = 1 << 18  # bytes that handover.py sends at most
PIPE, LAST_WORDS = 1 << 16, 4096  # bytes that a pipe holds, and of stderr that are kept
UNKNOWN, UNBORN = 1 << 8, 127 << 8  # as statuses: exit code 1, and a shell's for what can't be started
LEAVE, STAND_IN = b"\0", b"\1"  # what handover.py is told, before the exit code


class Guard:
    """The guard of one rank: a seed; with `path`, a newcomer; without `run`, somebody who stands in for one."""

    def __init__(self, run: str, member: str, path: str = "") -> None:
        self.run, self.member, self.path = run, member, path
        self.began = time.time()
        self.pid, self.rank = os.getpid(), -1  # of the rank, when there is one
        self.session = -1 if path else int(os.environ.get("PMI_FD", "-1"))
        self.listener: _socket.socket | None = None  # where handover.py comes
        self.caller: _socket.socket | None = None  # handover.py
        self.door: _socket.socket | None = None  # to the newcomer, which says there when MPI_Init has returned
        self.initialised = not path
        self.leader = -1  # pidfd of who started this newcomer, while it is there
        self.far_leader = ""  # number of who had this newcomer started from another host
        self.alone_since = float("inf")
        self.parent: _socket.socket | None = None  # the warm parent that has forked the newcomer
        self.unsaid = self.words = b""  # what is to be written to stderr, and the last of what was
        self.kill_at = float("inf") if run else time.monotonic() + STAND_IN_S

    def start(self, command: list[str]) -> None:
        """Start the rank."""
        self.stderr, theirs = os.pipe()
        os.set_blocking(self.stderr, False)
        given = [theirs, os.dup(2)]
        os.environ[STDERR] = str(given[1])  # for newcomers that this rank starts: they outlive this guard
        os.environ[GUARD] = str(os.getpid())
        if self.path:
            given.append(self.open_door())
            os.environ[DOOR] = str(given[2])
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a signal that comes now waits for the handlers
        if not self.path or not self.adopt(command, given):
            self.fork(command, given)
        for number in FORWARDED:
            signal.signal(number, self.pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        for descriptor in given:
            os.close(descriptor)

    def fork(self, command: list[str], given: list[int]) -> None:
        """Start the rank as a child; if there can be none, say so as if it had ended."""
        theirs = given[0]
        try:
            self.pid = os.fork()
        except OSError as problem:
            who = f"process {self.member}" if self.member else "somebody to stand in for a newcomer"
            text = f"{who} can't be started on {os.uname().nodename}: {limits.why_not(problem)}"
            self.unsaid = self.words = f"hpc_elastic: {text}\n".encode()
            return
        if self.pid == 0:
            os.dup2(theirs, 2)
            for descriptor in given[1:]:
                os.set_inheritable(descriptor, True)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            try:
                os.execvp(command[0], command)  # noqa: S606  (a shell is just what it must not be)
            except OSError as problem:
                os.write(2, f"hpc_elastic guard: {command[0]}: {problem.strerror}\n".encode())
                os._exit(127)
        self.rank = os.pidfd_open(self.pid)

    def adopt(self, command: list[str], given: list[int]) -> bool:
        """Have the warm parent of this host fork the newcomer; False, with the reason in its environment, if it does not."""
        os.environ[START] = str(self.began)
        adopted = adoption.adopt(self.run, command, given)
        if isinstance(adopted, str):
            os.environ[START] += f" cold: {adopted}" if adopted else " cold"
            return False
        self.pid, self.rank, self.parent = adopted
        return True

    def open_door(self) -> int:
        """Listen for handover.py, watch the leader, and return the newcomer's end of its door."""
        self.far_leader = os.environ.pop(LEADER, "")
        if not self.far_leader:
            leader = int(os.environ.pop(LEADER_PID, os.getppid()))
            try:
                self.leader = os.pidfd_open(leader)
            except ProcessLookupError:
                self.leader = -1
            if os.getppid() != leader:  # it has gone, and another process may have its number by now
                if self.leader >= 0:
                    os.close(self.leader)
                self.leader, self.alone_since = -1, time.monotonic()
        self.listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
        # The way through /proc is short, however long the run directory's name is: a socket's has 107 bytes at most.
        self.listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(self.path)}")
        self.listener.listen(1)
        os.close(folder)
        self.door, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        return theirs.detach()

    def close_door(self) -> None:
        """Listen no more."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            try:
                os.unlink(self.path)
            except OSError:
                pass  # the run directory may be gone

    # --- while the rank lives -----------------------------------------------------------------------------------------

    def send(self, number: int) -> None:
        """Send the rank a signal."""
        try:
            signal.pidfd_send_signal(self.rank, number)
        except OSError:
            pass  # it has just ended, or there was none

    def end(self) -> None:
        """End the rank, which may not heed SIGTERM."""
        if self.kill_at == float("inf"):
            self.kill_at = time.monotonic() + GRACE_S
            self.send(signal.SIGTERM)

    def pass_on(self, number: int, _: object) -> None:
        """Pass a signal to the guard on to the rank; one that has not joined the job is ended for good by SIGTERM."""
        if number == signal.SIGTERM and self.listener is not None:
            self.end()
        else:
            self.send(number)

    def watch(self) -> None:
        """Serve the rank until it has ended."""
        next_look = 0.0
        while self.rank >= 0:
            sockets = [socket.fileno() for socket in (self.listener, self.door, self.caller) if socket is not None]
            watched = [descriptor for descriptor in (self.rank, self.leader) if descriptor >= 0]
            heard = [self.stderr] if self.stderr >= 0 and len(self.unsaid) < PIPE else []
            ready, free, _ = select.select(sockets + watched + heard, [2] if self.unsaid else [], [], LOOK_S)
            if free:
                self.say()
            if self.stderr in ready:
                self.hear()
            if self.rank in ready:
                return
            if self.door is not None and self.door.fileno() in ready:
                self.answer(self.door)
            if self.caller is not None and self.caller.fileno() in ready:
                self.caller = None  # the launcher has ended it
                self.end()
            if self.listener is not None and self.listener.fileno() in ready:
                self.hand_on(self.listener)
            if self.leader in ready:
                self.leader, self.alone_since, next_look = -1, time.monotonic(), 0.0
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_S
                self.look()

    def there(self, *names: str) -> bool:
        """Tell whether there is such a file in the run directory."""
        try:
            os.stat(os.path.join(self.run, *names))
        except OSError as problem:
            # No word from a file system is not the word that the run directory is gone.
            return not names and not isinstance(problem, FileNotFoundError)
        return True

    def look(self) -> None:
        """Look for reasons to end the rank."""
        now = time.monotonic()
        if self.far_leader and not self.led():
            self.far_leader, self.alone_since = "", now
        if self.alone_since <= now and self.there("ranks", f"{self.member}.json"):
            self.alone_since = float("inf")  # it is a member, on its own
        # Once it is connected, it may become a member with those that survive the leader. Before, it is killed at once: Open
        # MPI's launcher crashes easily when somebody tries to connect with a process that is gone.
        forgotten = now - self.alone_since >= (GRACE_S if self.initialised else 0)
        if self.run and (not self.there() or (self.listener is not None and self.there("failure.json"))):
            self.end()
        if now >= self.kill_at or forgotten or (self.run and self.there("condemned", self.member)):
            self.send(signal.SIGKILL)

    def led(self) -> bool:
        """Tell whether who had this newcomer started is there."""
        if self.far_leader:
            return not self.there("ranks", f"{self.far_leader}.end.json")
        return self.leader >= 0 and not select.select([self.leader], [], [], 0)[0]

    def hear(self) -> None:
        """Take what the rank wrote to its stderr."""
        try:
            data = os.read(self.stderr, PIPE)
        except BlockingIOError:
            return
        if not data:
            self.stderr = -1
        self.unsaid += data
        self.words = (self.words + data)[-LAST_WORDS:]

    def say(self) -> None:
        """Write as much of it to stderr as that takes without blocking."""
        try:
            self.unsaid = self.unsaid[os.write(2, self.unsaid[: select.PIPE_BUF]) :]
        except OSError:
            self.unsaid = b""  # nobody is there to read it

    def answer(self, door: _socket.socket) -> None:
        """Take the newcomer's word that MPI_Init has returned."""
        try:
            word = door.recv(1)
        except OSError:
            word = b""  # it ended before it had taken the gifts
        if word:
            self.initialised = True
        else:
            self.door = None

    def hand_on(self, listener: _socket.socket) -> None:
        """Take the launcher's gifts from handover.py and hand them on to the newcomer."""
        try:
            caller = _socket.socket(fileno=listener._accept()[0])  # type: ignore[attr-defined]  # noqa: SLF001
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            return  # nobody has come, and nobody can any more
        caller.settimeout(ANSWER_S)
        try:
            data, ancillary, _, _ = caller.recvmsg(LARGEST, 1024)
        except OSError:
            data = b""
        if data:
            self.caller = caller
            given = adoption.numbers(ancillary[0][2]) if ancillary else []
            stdout, stderr, self.session = (*given, -1)[:3]
            self.close_door()
            try:
                if self.door is not None:
                    self.door.sendmsg([data], ancillary)
            except OSError:
                pass  # the newcomer has just ended
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(stdout)

    # --- when it has ended --------------------------------------------------------------------------------------------

    def bury(self) -> int:
        """Record how the rank ended, put things right with its launcher, and return the code to end with."""
        if self.stderr >= 0:
            self.hear()  # one reading takes all that a pipe holds; others who may hold its end are not waited for
        status, peak_kib = self.outcome()
        ended = os.waitstatus_to_exitcode(status)
        code = ended if ended >= 0 else 128 - ended
        if self.run:
            self.record(code, max(0, -ended), peak_kib * 1024)
        if self.listener is not None:
            self.listener.shutdown(_socket.SHUT_RDWR)  # handover.py, if it comes now, is refused, and has somebody stand in
            self.hand_on(self.listener)  # if it came just before, it must be told
        if self.caller is not None and self.door is not None and select.select([self.door], [], [], 0)[0]:
            self.answer(self.door)
        # If there are no others, or the job has failed, the launcher may know how it ended.
        last = self.there("failure.json") or not (self.path or self.there("ranks", f"{self.member}.json"))
        told = code if self.run and last else 0
        wanted = self.caller is not None and not self.initialised and self.led()
        if self.session >= 0:
            self.settle(close=not wanted)
        if self.caller is not None:
            try:
                self.caller.send((STAND_IN if wanted else LEAVE) + bytes([told]))
            except OSError:
                pass
        self.close_door()
        while self.unsaid and select.select([], [2], [], GRACE_S)[1]:
            self.say()
        return code if self.path else told

    def outcome(self) -> tuple[int, int]:
        """Return how the rank ended, as wait(2) says it, and the most memory that it had, in KiB."""
        if self.rank < 0:
            return UNBORN, 0
        if self.parent is None:
            _, status, usage = os.wait4(self.pid, 0)
            return status, usage.ru_maxrss
        told = adoption.outcome(self.parent)
        if told is None:
            self.words += b"\nit is not known how it ended: its warm parent is gone, or stopped"
        return told or (UNKNOWN, 0)

    def settle(self, *, close: bool) -> None:
        """Put the PMI session in order, and if asked to close it, as the rank can't any more (PMI-1 wire protocol)."""
        try:
            # The launcher fails if nobody takes its answer to what the rank has asked; nor must another get that.
            while select.select([self.session], [], [], SETTLE_S)[0] and os.read(self.session, PIPE):
                pass
            if close:
                os.write(self.session, b"cmd=finalize\n")
                select.select([self.session], [], [], ANSWER_S)
        except OSError:
            pass  # the rank has closed it itself, or the launcher is gone

    def record(self, code: int, number: int, peak_bytes: int) -> None:
        """Write down how the rank ended."""
        from _json import encode_basestring_ascii as quoted  # json itself takes some ms to import, and others wait for this

        words, host = self.words.decode(errors="replace"), os.uname().nodename
        text = (
            f'{{"member":{int(self.member)},"pid":{self.pid},"host":{quoted(host)},"code":{code},"signal":{number},'
            f'"time":{time.time()},"peak_bytes":{peak_bytes},"last_words":{quoted(words)}}}'
        )
        folder, name = os.path.join(self.run, "ranks"), f"{self.member}.end.json"
        beside = os.path.join(folder, f".{name}.{os.getpid()}")
        try:
            with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(text)
            os.rename(beside, os.path.join(folder, name))
        except OSError as problem:
            how = f"was killed by signal {number}" if number else f"ended with exit code {code}"
            text = f"process {self.member} (pid {self.pid} on {host}) {how}; could not be recorded in {self.run}: {problem}"
            self.unsaid += f"hpc_elastic guard: {text}\n".encode()


def main() -> None:
    """Be the guard of one rank."""
    kind, *arguments = sys.argv[1:]
    if kind == "--stand-in":
        guard, command = Guard("", ""), arguments
    elif kind == "--warm":
        guard, command = Guard(arguments[1], arguments[2], arguments[0]), arguments[3:]
    else:
        guard, command = Guard(kind, arguments[0]), arguments[1:]
    guard.start(command)
    guard.watch()
    os._exit(guard.bury())


if __name__ == "__main__":
    main()
