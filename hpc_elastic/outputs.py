"""What ranks on companions print: it goes into files there, and the supervisor passes it on."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import BinaryIO

LAST_WORDS_S = 5.0  # how long companions that are about to end are waited for
LOOK_S = 0.05


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
        self._to.write(whole)
        self._to.flush()

    def finish(self) -> None:
        """Wait a moment for companions to end, whose last words come then."""
        deadline = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline and any(not self._has_ended(path) for path in self._files()):
            time.sleep(LOOK_S)

    @staticmethod
    def _has_ended(out: Path) -> bool:
        return os.path.exists(out.with_suffix(".end"))  # noqa: PTH110  (called often)
