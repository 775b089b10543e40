"""Adoption: has the warm parent of this host fork a newcomer. For `guard`, which loads this by its path."""

from __future__ import annotations

import _socket
import os
import sys

ASK_S, ANSWER_S = 1.0, 2.0  # how long the warm parent may take to fork; to tell how that process has ended
ANSWER = 1 << 16  # bytes of an answer at most


def numbers(data: bytes) -> list[int]:
    """Return the integers in what the kernel says of a socket."""
    return [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]


def request(command: list[str]) -> bytes:
    """Return what is asked of a warm parent: to be what `command`, a newcomer's, would be here; see `warmth.unpacked`."""
    mask = os.umask(0)
    os.umask(mask)
    package, arguments = os.path.dirname(os.path.abspath(__file__)), command[3:]
    fields = [command[0], package, os.getcwd(), str(mask), str(len(arguments)), *arguments]
    return b"\0".join([os.fsencode(each) for each in (*fields, *(f"{k}={v}" for k, v in os.environ.items()))])


def unready(place: str) -> str:
    """Return why no warm parent listens at `place`; nothing, if there is none."""
    try:
        with open(f"{place}.refused", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        # One that is importing has its lock, and does not listen yet.
        return "it was not ready" if os.path.exists(f"{place}.lock") else ""


def adopt(run: str, command: list[str], given: list[int]) -> tuple[int, int, _socket.socket] | str:
    """Have the warm parent fork the newcomer that `command` would start, with the descriptors `given`.

    Returns
    -------
    tuple or str
        The newcomer's number, its pidfd, and the line on which its parent will say how it ended; or why there is none.
    """
    place, host = os.path.join(run, "warm"), os.uname().nodename
    parent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    parent.settimeout(ASK_S)
    rank = -1
    try:
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            parent.connect(f"/proc/self/fd/{folder}/{host}.sock")
        finally:
            os.close(folder)
        parent.send(request(command))
        answer, ancillary, _, _ = parent.recvmsg(ANSWER, 64)  # it serves its own user alone
        if answer[:1] == b"f" and ancillary:
            (rank,) = numbers(ancillary[0][2])
            # Without these the newcomer ends, since somebody else may have been started for it. They go to it alone: the
            # launcher waits until nobody has its own any more, and a parent that is stopped would not let go of them.
            rights = b"".join(number.to_bytes(4, sys.byteorder) for number in (1, *given))
            parent.sendmsg([b"g"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            parent.settimeout(ANSWER_S)
            return int(answer[1:]), rank, parent
        why = answer[1:].decode(errors="replace") or "it has ended"
    except (FileNotFoundError, ConnectionRefusedError):
        why = unready(os.path.join(place, host))
    except TimeoutError:
        why = f"it did not answer within {ASK_S:g} s"
    except OSError as problem:
        why = str(problem)
    if rank >= 0:
        os.close(rank)
    parent.close()
    return why


def outcome(parent: _socket.socket) -> tuple[int, int] | None:
    """Return how the newcomer has ended, as wait(2) says it, and its peak memory in KiB; None if nobody knows."""
    try:
        ended, peak_kib = parent.recv(ANSWER).split()
    except (OSError, ValueError):
        return None
    return int(ended), int(peak_kib)
