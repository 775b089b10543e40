"""The log of a run for TensorBoard, written from its events: one writer, whoever leads and however often the job starts."""

from __future__ import annotations

import contextlib
import glob
import socket
import time
from typing import TYPE_CHECKING

from . import events
from .course import Back, Change, Course, Entry
from .errors import ConfigError
from .standing import LIVE, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .rundir import RunDirectory

LOOK_S = 1.0
FAILED_S = 10.0  # after a failure: until then its supervisor has said that it starts the job again
SUFFIX = "hpc_elastic-"  # of the log's name, with that of the run, to find it again


class Log:
    """Writes one event file of TensorBoard's, as TensorBoard documents them (``event.proto``, ``summary.proto``).

    Parameters
    ----------
    path : Path
        The file, which is made anew, but not where TensorBoard is missing.
    """

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._records = RecordWriter(path.open("wb"))
        # From version 2 on, the start of a session takes back what was logged of that step and the ones after.
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def put(self, entry: Entry) -> None:
        """Write what `entry` says."""
        if isinstance(entry, Back):
            start = self._session(status=self._session.START)
            self._write(self._event(wall_time=entry.time, step=entry.step + 1, session_log=start))
        elif isinstance(entry, Change):
            values = {"job/ranks": entry.ranks, **({"job/standstill_s": entry.standstill_s} if entry.standstill_s else {})}
            self._scalars(entry.time, entry.step, values)
        else:
            prefix = "" if entry.epoch is None else "epoch/"
            self._scalars(entry.time, entry.step, {prefix + name: value for name, value in entry.metrics.items()})

    def _scalars(self, when: float, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(self._event(wall_time=when, step=step, summary=summary))

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]

    def flush(self) -> None:
        """Let readers see it."""
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def write(run: RunDirectory, folder: Path, *, follow: bool, pause: Callable[[float], None] = time.sleep) -> Path:
    """Write the log of `run` into `folder`, in place of an earlier one of its own, and return its path.

    Parameters
    ----------
    run : RunDirectory
        The run.
    folder : Path
        Made if it is not there.
    follow : bool
        True goes on until the job is over, or the process gets SIGINT.
    pause : callable
        Waits for a number of seconds.

    Raises
    ------
    ConfigError
        If TensorBoard is missing, or the folder can't be written to.
    RunDirectoryError
        If the events are damaged.
    """
    suffix = SUFFIX + run.path.resolve().name
    path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Log(path)) as log, contextlib.suppress(KeyboardInterrupt):
            for old in folder.glob(f"events.out.tfevents.*.{glob.escape(suffix)}"):
                if old != path:
                    old.unlink(missing_ok=True)
            _fill(log, run, follow=follow, pause=pause)
    except ImportError as error:
        raise ConfigError("the log for TensorBoard needs it: pip install 'hpc_elastic[tensorboard]'") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from error
    return path


def _fill(log: Log, run: RunDirectory, *, follow: bool, pause: Callable[[float], None]) -> None:
    course, reader, failed_s, awaited = Course(), events.Reader(run.events), 0.0, False
    while True:
        status, failure = look(run)  # before the events: what it says is in them
        failed_s = failed_s + LOOK_S if failure is not None else 0.0
        for event in reader.read():
            for entry in course.follow(event):
                log.put(entry)
            awaited = isinstance(event, events.Restarted)
        log.flush()
        over = status is not None and status.state not in LIVE
        if not follow or over or (failed_s > FAILED_S and not awaited):
            return
        pause(LOOK_S)
