"""Warm parent of a node: has imported what the job imports, and forks newcomers from that in milliseconds.

    python -m hpc_elastic.warm RUN

In the run directory, below ``warm``, it reads ``spec.json``; locks ``HOST.lock``, of which the kernel lets go when it ends;
writes ``HOST.log``, and ``HOST.refused`` if it finds that it can't serve; and when it is ready listens at ``HOST.sock``.
There a newcomer's guard asks it for a process, and says which variables this is to have. It forks; the guard sends the new
process its descriptors, and is told in the end how it has ended, which only a parent gets to know. Who is not served starts
as ever.

Some children it forks ahead of time, each for one newcomer, which import what needs MPI, rehearse what costs once a process,
and then wait. When the run is over they kill the parent if it is stopped, as there may be nobody else to do that.

It does nothing but import itself: no MPI, no operation, no thread goes on in it, since a fork takes none along. It imports
in a thread of low priority, so that the ranks are not slowed; the thread that forks has the usual one, which nobody can get
back. It ends when the run is over, or gone, or when no rank has given a sign of life for `QUIET_S` seconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from . import locks, warmth
from .encoding import decoded
from .newborn import Newborn, be_born, get_ready
from .preloading import preload_gently, threads
from .processes import is_stopped

LOOK_S, BEATS_S, QUIET_S = 0.25, 2.0, 10.0
ANSWER_S, GO_S = 0.5, 5.0
LARGEST = 1 << 18  # bytes of a request
AHEAD, AHEAD_S = 2, 2.0  # processes that wait; how long after a request new ones are forked
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # after ones that failed, each time twice as long; then no more
IGNORED = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
HOST = os.uname().nodename


@dataclass
class Child:
    """A process that was forked: its number, a descriptor of it, and the line to its guard, or to it while it waits."""

    pid: int
    descriptor: int
    line: socket.socket

    @property
    def ready(self) -> bool:
        """Whether one that waits has said so, or has ended."""
        return bool(select.select([self.line], [], [], 0)[0])


@dataclass
class WarmParent:
    """The warm parent of this host, for the run in the folder `run`."""

    run: Path
    children: list[Child] = field(default_factory=list)
    waiting: list[Child] = field(default_factory=list)
    next_ahead: float = 0.0
    pause_s: float = PAUSE_S
    next_beats: float = 0.0
    beats: dict[str, int] = field(default_factory=dict)
    quiet_since: float = field(default_factory=time.monotonic)
    next_look: float = 0.0
    stale: bool = False

    def __post_init__(self) -> None:
        self.folder = self.run / "warm"
        self.socket, self.refused = self.folder / f"{HOST}.sock", self.folder / f"{HOST}.refused"
        self.spec = decoded((self.folder / "spec.json").read_bytes(), warmth.Spec)
        self.born = dict(os.environ)
        self.dispositions = {number: signal.getsignal(number) for number in IGNORED}
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)  # the terminal's are for the ranks

    # --- whether it is wanted -----------------------------------------------------------------------------------------

    def over(self) -> bool:
        """Tell whether nobody needs it any more."""
        if (self.run / "failure.json").exists() or not self.folder.is_dir():
            return True
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((self.run / "status.json").read_bytes())["state"] in ("ended", "stopped"):
                return True
        now = time.monotonic()
        if now < self.next_beats:
            return False
        self.next_beats = now + BEATS_S
        found = dict[str, int]()
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.run / "ranks"):
                if entry.name.endswith(".beat"):
                    found[entry.name] = entry.stat().st_mtime_ns
        if found != self.beats:
            self.beats, self.quiet_since = found, now
        return now - self.quiet_since > QUIET_S

    def lock(self) -> bool:
        """Be the only one of this host; False if there is one."""
        locked = locks.take(self.folder / f"{HOST}.lock")
        if locked is None:
            return False
        self.locked = locked
        locked.truncate(0)
        locked.write(str(os.getpid()).encode())  # for people
        locked.flush()
        return True

    # --- getting ready ------------------------------------------------------------------------------------------------

    def warm_up(self) -> str:
        """Import everything; return why it can't serve, or nothing."""
        sys.path[:] = self.spec.path
        self.modules = self.spec.modules
        self.stamps = warmth.stamps(self.modules, self.spec.path)
        begun, problems = time.monotonic(), dict[str, str]()
        worker = threading.Thread(target=lambda: problems.update(preload_gently(self.spec.modules)), daemon=True)
        worker.start()
        while worker.is_alive():
            worker.join(LOOK_S)
            if self.over():
                os._exit(0)
        # What these have imported themselves, as plugins or settings of the user's own: that may change as well.
        self.modules = warmth.preloadable(dict(sys.modules), list(map(Path, self.spec.path))) | self.spec.modules
        self.stamps = warmth.stamps(self.modules, self.spec.path) | self.stamps
        left = threads()
        for name, problem in problems.items():
            print(f"not imported: {name}: {problem}", flush=True)
        print(f"{len(self.spec.modules)} modules in {time.monotonic() - begun:.1f} s", flush=True)
        if left:
            return f"what it imports goes on in {left} threads, which a fork does not take along"
        gc.collect()
        gc.freeze()  # so that collections in the children don't touch, and thereby copy, what is shared
        return ""

    def refuse(self, why: str) -> None:
        """Say so to guards, and to those that would start another one."""
        beside = self.folder / f".{self.refused.name}.{os.getpid()}"
        with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(why)
        beside.rename(self.refused)

    def listen(self) -> None:
        """Be there for guards."""
        self.refused.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        before = os.umask(0o077)
        self.listener.bind(f"/proc/self/fd/{folder}/{self.socket.name}")
        os.umask(before)
        os.close(folder)
        self.listener.listen(64)

    # --- serving ------------------------------------------------------------------------------------------------------

    def serve(self) -> Newborn | None:
        """Serve until the run is over; in a process that was forked, return what that is to be."""
        while not self.stale or self.children:
            watched = [child.descriptor for child in (*self.children, *self.waiting)]
            listening = [] if self.stale else [self.listener.fileno()]
            ready, _, _ = select.select([*listening, *watched], [], [], LOOK_S)
            if listening and listening[0] in ready:
                newborn = self.answer()
                if newborn is not None:
                    return newborn
            for child in [child for child in (*self.children, *self.waiting) if child.descriptor in ready]:
                self.bury(child)
            if not self.stale and len(self.waiting) < AHEAD and time.monotonic() >= self.next_ahead:
                newborn = self.fork_ahead()
                if newborn is not None:
                    return newborn
            if time.monotonic() >= self.next_look:
                self.next_look = time.monotonic() + LOOK_S
                if self.over() and not self.children:
                    break
        if not self.stale:  # then it would be another one's
            self.socket.unlink(missing_ok=True)
        return None

    def retire(self) -> None:
        """Make room for another one, and serve only those that were forked, until they have ended."""
        self.stale = True
        self.listener.close()
        self.socket.unlink(missing_ok=True)
        self.locked.close()
        for child in self.waiting:
            child.line.close()  # which ends it

    def answer(self) -> Newborn | None:
        """Answer one guard; in the process that it gets, return what that is to be."""
        line, _ = self.listener.accept()
        line.settimeout(ANSWER_S)
        try:
            data = line.recv(LARGEST)
            why = self.unfit(line, data)
            if not why:
                self.next_ahead = max(self.next_ahead, time.monotonic() + AHEAD_S)
                return self.fork(line, data)
            line.send(b"n" + why.encode())
        except (OSError, ValueError) as problem:
            with contextlib.suppress(OSError):
                line.send(b"n" + f"it could not fork: {problem}".encode())
        line.close()
        return None

    def unfit(self, line: socket.socket, data: bytes) -> str:
        """Return why this process is not the one to fork for who asks, or nothing."""
        _, user, _ = struct.unpack("iII", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.geteuid():
            return f"it serves user {os.geteuid()}, and user {user} asks"
        asked, now = warmth.unpacked(data), warmth.stamps(self.modules, self.spec.path)
        why = warmth.mismatch(asked, self.born, self.stamps, now)
        if why:
            self.retire()  # whoever starts the next one does that with the files and variables of then
            print(f"not served: {why}", flush=True)
        return why

    def forked(self, line: socket.socket) -> Child | None:
        """Fork; return the new process, with `line`, or in that None: it has then nothing of what is the parent's alone.

        Raises
        ------
        OSError
            If there can't be another process; never in the new one.
        """
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self.listener.close()
            self.locked.close()
            for child in (*self.children, *self.waiting):
                os.close(child.descriptor)
                child.line.close()
            self.children, self.waiting = [], []
            return None
        try:
            return Child(pid, os.pidfd_open(pid), line)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def fork(self, line: socket.socket, data: bytes) -> Newborn | None:
        """Give a guard a process that waits, or a new one; in that, return what it is to be."""
        child = next((child for child in self.waiting if child.ready), None)
        if child is not None:
            self.waiting.remove(child)
            try:
                child.line.recv(1)  # what is not read would end the line
                socket.send_fds(child.line, [data], [line.fileno()])
            except OSError:  # it has just ended, or does now
                child.line.close()
                self.bury(child)
                child = None
            else:
                child.line.close()
                child.line, self.pause_s = line, PAUSE_S
        if child is None:
            child = self.forked(line)
            if child is None:
                return self.newborn(line, data)
        self.children.append(child)
        with contextlib.suppress(OSError):  # the guard is gone, and so will be the child
            socket.send_fds(line, [b"f" + str(child.pid).encode()], [child.descriptor])
        return None

    def fork_ahead(self) -> Newborn | None:
        """Fork a process that gets ready and waits; in that, return what it is to be when it is wanted."""
        try:
            mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            self.put_off()
            return None
        parent = os.getpid()
        try:
            child = self.forked(mine)
        except OSError:
            mine.close()
            theirs.close()
            self.put_off()
            return None
        if child is not None:
            theirs.close()
            self.waiting.append(child)
            return None
        mine.close()
        get_ready(self.spec)
        try:
            data, line = self.wanted(theirs, parent)
        except OSError:
            os._exit(0)  # the parent has ended
        return self.newborn(line, data)

    def wanted(self, theirs: socket.socket, parent: int) -> tuple[bytes, socket.socket]:
        """Wait, in a process that is ready, until it is wanted; return for what, and its guard's line.

        Raises
        ------
        OSError
            If the parent has ended.
        """
        handle = os.pidfd_open(parent)
        if os.getppid() != parent:
            raise ProcessLookupError
        theirs.send(b"r")
        while not select.select([theirs], [], [], BEATS_S)[0]:
            with contextlib.suppress(OSError):  # of the run directory, now and then
                if self.over() and is_stopped(parent):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        data, descriptors, _, _ = socket.recv_fds(theirs, LARGEST, 1)
        if not data:
            raise ConnectionResetError
        theirs.close()
        os.close(handle)
        return data, socket.socket(fileno=descriptors[0])

    def put_off(self) -> None:
        """Fork none ahead for a while, as that failed, and at last none any more; newcomers are forked all the same."""
        self.next_ahead = time.monotonic() + self.pause_s if self.pause_s <= LONGEST_PAUSE_S else float("inf")
        self.pause_s *= 2

    def newborn(self, line: socket.socket, data: bytes) -> Newborn:
        """Return what this process is to be, once its guard has said that it is still wanted, and sent its descriptors."""
        line.settimeout(GO_S)
        try:
            go, descriptors, _, _ = socket.recv_fds(line, 1, 8)
        except OSError:
            go = b""
        if not go:
            os._exit(0)  # the guard has waited no longer
        line.close()
        return Newborn(warmth.unpacked(data), descriptors, self.dispositions)

    def bury(self, child: Child) -> None:
        """Tell the guard of a newcomer how that has ended; one that waited has none."""
        _, status, usage = os.wait4(child.pid, 0)
        if child in self.children:
            self.children.remove(child)
            with contextlib.suppress(OSError):
                child.line.send(f"{status} {usage.ru_maxrss}".encode())
        elif child in self.waiting:
            self.waiting.remove(child)
            self.put_off()
        child.line.close()
        os.close(child.descriptor)


def main() -> None:
    """Be the warm parent; in the processes that it forks, be a newcomer."""
    parent = WarmParent(Path(sys.argv[1]))
    if not parent.lock():
        return
    why = parent.warm_up()
    if why:
        parent.refuse(why)
        sys.exit(f"no newcomers from here: {why}")
    parent.listen()
    newborn = parent.serve()
    if newborn is None:
        sys.stdout.flush()
        os._exit(0)  # what libraries do at the end of a process is not for one that used none
    del parent
    be_born(newborn)


if __name__ == "__main__":
    main()
