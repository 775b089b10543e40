"""The job's progress on the terminal: a live bar where there is one, else plain lines. Drawn by one process only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from .config import SUPERVISED_VARIABLE
from .streams import put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress as Bar

    from .rundir import Status

PLAIN_EVERY_S = 5.0
SMOOTH = 0.3  # weight of the newest rate


class Progress:
    """Shows one status after the other, on stderr.

    Parameters
    ----------
    mode : str
        ``bar``, ``plain`` or ``off``.
    clock : callable
        Seconds.
    """

    def __init__(self, mode: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._mode = mode
        self._clock = clock
        self._bar: Bar | None = None
        self._last: tuple[object, ...] = ()
        self._last_time = 0.0
        self._rate = 0.0
        self._rate_of = 0.0

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
        if self._mode == "off":
            return
        status = self._smoothed(status)
        if self._mode == "bar":
            self._show_bar(status)
        else:
            self._show_line(status)

    def _smoothed(self, status: Status) -> Status:
        """Return `status` with a rate that does not fall to 0, or leap, where an epoch begins and its count anew."""
        if status.time != self._rate_of and status.samples_per_s > 0:
            new = status.samples_per_s
            self._rate = SMOOTH * new + (1 - SMOOTH) * self._rate if self._rate else new
            self._rate_of = status.time
        running = status.state == "running"
        return msgspec.structs.replace(status, samples_per_s=self._rate) if running else status

    def _show_line(self, status: Status) -> None:
        now = self._clock()
        key = (status.state, status.ranks, status.epoch, status.under_way)
        if key == self._last and (now - self._last_time < PLAIN_EVERY_S or status.state != "running"):
            return
        self._last, self._last_time = key, now
        _write(f"{status.state}: {describe(status)}")

    def _show_bar(self, status: Status) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.add_task("", total=None, text="")
            self._bar.start()
        first, *others = _parts(status)
        self._bar.update(
            self._bar.task_ids[0],
            description=first if status.state in ("starting", "running") else f"{status.state}, {first}",
            total=status.steps or None,
            completed=status.step,
            text=", ".join(others),
        )

    def tell(self, text: str) -> None:
        """Write `text`, which is no progress and is shown in every mode, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            _write(text)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone
                self._bar.stop()
            self._bar = None


def _new_bar() -> Bar:
    # Ranks import this module, and few of them draw.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # No markup: a metric's name may hold brackets.
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[text]}", markup=False))
    return Progress(texts[0], BarColumn(), texts[1], TimeElapsedColumn(), console=Console(stderr=True))


def _write(line: str) -> None:
    put(sys.stderr, line + "\n")


def _parts(status: Status) -> list[str]:
    """Return how far the job is, and then the rest, one string each."""
    epochs = max(status.epochs, 1)
    if status.unit == "samples":
        far = [f"epoch {min(status.epoch + 1, epochs)}/{epochs}", f"step {status.step}/{status.steps}"]
    else:
        far = [f"{status.unit.removesuffix('s')} {status.step}/{status.steps}"]
    parts = [
        *far,
        *([f"{status.samples_per_s:,.0f} {status.unit}/s"] if status.samples_per_s else []),
        *([f"{status.ranks} rank{'s' if status.ranks != 1 else ''}"] if status.ranks else []),
        *([f"{status.parked} parked"] if status.parked else []),
        *(f"{name} {value:.4g}" for name, value in status.metrics.items()),
    ]
    return [*parts[:-1], f"{parts[-1]} ({status.under_way})"] if status.under_way else parts


def describe(status: Status) -> str:
    """Return a status in one line."""
    return ", ".join(_parts(status))


@contextmanager
def counting(title: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is that is counted, on stderr: a bar on a terminal, else a line now and then.

    Yields
    ------
    advance : callable
        Takes the number done so far and the total.
    """
    if not sys.stderr.isatty():
        yield _plain_count(title, clock)
        return
    with _new_bar() as bar:
        task = bar.add_task(title, total=None, text="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, text=f"{done:,}/{total:,}")

        yield advance


def _plain_count(title: str, clock: Callable[[], float]) -> Callable[[int, int], None]:
    due = clock() + PLAIN_EVERY_S

    def advance(done: int, total: int) -> None:
        nonlocal due
        if done == total or clock() >= due:
            due = clock() + PLAIN_EVERY_S
            _write(f"{title}: {done:,}/{total:,}")

    return advance
