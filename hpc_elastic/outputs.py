"""What a job prints, on its way to who reads that, who may have gone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, AnyStr, BinaryIO

from .config import RUN_VARIABLE

RELAY = Path(__file__).parent / "relay.py"
LAST_WORDS_S = 5.0  # how long companions that are about to end are waited for, and who reads slowly
LOOK_S = 0.05
GONE = (errno.EPIPE, errno.EIO)  # a reader, or a terminal


def have_all() -> None:
    """Let stdin, stdout and stderr go nowhere where whoever started this process has closed them.

    The next file that is opened would take the place of one, and get what is printed, or be held open by each child.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (for as long as this process lasts)


def put(stream: IO[AnyStr], words: AnyStr) -> None:
    """Write `words` to `stream` at once. If nobody reads it any more, it goes nowhere from now on."""
    try:
        stream.write(words)
        stream.flush()
    except BlockingIOError:
        pass  # somebody has set it so; what is left in the stream's buffer goes with the next words
    except OSError as problem:
        # What can't be written stays in the stream's buffer, and would fail again, at the latest when the process ends.
        with contextlib.suppress(OSError):
            kept, null = os.dup(stream.fileno()), os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            stream.flush()
            if problem.errno not in GONE:  # a disk that is full may have room again
                os.dup2(kept, stream.fileno())
            os.close(null)
            os.close(kept)


class Relay:
    """A process that passes on what a launcher prints to this process's stdout and stderr; see `hpc_elastic.relay`.

    Attributes
    ----------
    stdout, stderr : int
        Descriptors for the launcher; one and the same if this process has both in one place, so that the order stays.
    """

    def __init__(self) -> None:
        pairs = [os.pipe()]
        if not os.path.sameopenfile(1, 2):
            pairs.append(os.pipe())
        ends = [end for to, (reader, _) in enumerate(pairs, 1) for end in (reader, to)]
        command = [sys.executable, "-I", "-S", str(RELAY), *map(str, ends)]
        # It is no process of the run, as it ends by itself; but Python may need the rest, as LD_LIBRARY_PATH.
        environ = {name: value for name, value in os.environ.items() if name != RUN_VARIABLE}
        try:
            self._process = subprocess.Popen(
                command, env=environ, pass_fds=ends, stdin=subprocess.DEVNULL, start_new_session=True
            )
        finally:
            for reader, _ in pairs:
                os.close(reader)
        self.stdout, self.stderr = pairs[0][1], pairs[-1][1]

    def begun(self) -> None:
        """Close the ends that the launcher has by now."""
        for end in {self.stdout, self.stderr}:
            os.close(end)

    def finish(self) -> None:
        """Wait, for a moment, until all that the launcher had printed is passed on."""
        self._process.send_signal(signal.SIGCONT)  # stopped, it would stay for ever
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_S)


class Outputs:
    """The outputs of a run's companions.

    Parameters
    ----------
    folder : Path
        Where they are, in files ``N.out``.
    to : binary file
        Where they go.
    """

    def __init__(self, folder: Path, to: BinaryIO) -> None:
        self._folder = folder
        self._to = to
        self._read: dict[str, int] = {}  # file -> bytes passed on so far
        self.pass_over()

    def pass_over(self) -> None:
        """Pass over what is there already: it is of a run that is resumed."""
        for path in self._files():
            with contextlib.suppress(OSError):
                self._read[path.name] = path.stat().st_size

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.out"))

    def relay(self, *, all_of_it: bool = False) -> None:
        """Pass on whole lines that have come since the last call, and with `all_of_it` the rest as well."""
        for path in self._files():
            with contextlib.suppress(OSError):
                self._relay(path, all_of_it=all_of_it)

    def _relay(self, path: Path, *, all_of_it: bool) -> None:
        at = self._read.get(path.name, 0)
        if path.stat().st_size <= at:
            return
        with path.open("rb") as file:
            file.seek(at)
            data = file.read()
        whole = data if all_of_it else data[: data.rfind(b"\n") + 1]
        self._read[path.name] = at + len(whole)
        put(self._to, whole)

    def finish(self) -> None:
        """Wait a moment for companions to end, whose last words come then."""
        deadline = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline and any(not self._has_ended(path) for path in self._files()):
            time.sleep(LOOK_S)

    @staticmethod
    def _has_ended(out: Path) -> bool:
        return os.path.exists(out.with_suffix(".end"))  # noqa: PTH110  (called often)
