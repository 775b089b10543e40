"""What a job prints, on its way to who reads that, who may have gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from .config import RUN_VARIABLE
from .streams import put

RELAY = Path(__file__).parent / "relay.py"
LAST_WORDS_S = 5.0  # how long companions that are about to end are waited for, and who reads slowly
LOOK_S = 0.05


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
        self.stdout, self.stderr = pairs[0][1], pairs[-1][1]
        try:
            self._process = subprocess.Popen(
                command, env=environ, pass_fds=ends, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError:
            self.begun()
            raise
        finally:
            for reader, _ in pairs:
                os.close(reader)

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

    def pass_on(self, *, all_of_it: bool = False) -> None:
        """Pass on whole lines that have come since the last call, and with `all_of_it` the rest as well."""
        for path in self._files():
            with contextlib.suppress(OSError):
                self._pass_on(path, all_of_it=all_of_it)

    def _pass_on(self, path: Path, *, all_of_it: bool) -> None:
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
