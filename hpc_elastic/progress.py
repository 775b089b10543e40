"""The job's progress on the terminal: a live bar where there is one, plain lines elsewhere. Drawn by one process only."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from .config import SUPERVISED_VARIABLE

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from .rundir import Status

PLAIN_EVERY_S = 5.0


class Progress:
    """Shows one status after the other.

    Parameters
    ----------
    mode : str
        ``bar``, ``plain`` or ``off``.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._bar: Bar | None = None
        self._last = ("", 0, -1)
        self._last_time = 0.0

    @classmethod
    def of_leader(cls, setting: str) -> Progress:
        """Return the progress as the leader shows it: not at all where a supervisor does."""
        return cls("off" if SUPERVISED_VARIABLE in os.environ else cls.mode(setting))

    @staticmethod
    def mode(setting: str) -> str:
        """Return the mode for the setting ``progress`` on this terminal."""
        if setting != "auto":
            return setting
        return "bar" if sys.stderr.isatty() else "plain"

    def show(self, status: Status) -> None:
        """Show `status`."""
        if self._mode == "bar":
            self._show_bar(status)
        elif self._mode == "plain":
            self._show_line(status)

    def _show_line(self, status: Status) -> None:
        now = time.monotonic()
        key = (status.state, status.ranks, status.epoch)
        if key == self._last and now - self._last_time < PLAIN_EVERY_S:
            return
        self._last, self._last_time = key, now
        sys.stderr.write(f"{status.state}: {describe(status)}\n")
        sys.stderr.flush()

    def _show_bar(self, status: Status) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=False)
            self._bar.add_task("", total=None, text="")
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            description=f"epoch {min(status.epoch + 1, status.epochs)}/{status.epochs}",
            total=status.steps or None,
            completed=status.step,
            text=describe(status),
        )

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def describe(status: Status) -> str:
    """Return a status in one line."""
    parts = [
        f"epoch {min(status.epoch + 1, max(status.epochs, 1))}/{max(status.epochs, 1)}",
        f"step {status.step}/{status.steps}",
        f"{status.samples_per_s:,.0f} samples/s",
        f"{status.ranks} rank{'s' if status.ranks != 1 else ''}",
        *(f"{name} {value:.4g}" for name, value in status.metrics.items()),
    ]
    if status.under_way:
        parts.append(f"({status.under_way})")
    return ", ".join(parts)
