"""The desk: threads that read the queue and the companions' files, and carry orders to Slurm, while the job steps on.

Slurm may be slow, restarting or gone for minutes. Nothing here is ever waited for: the broker looks at the last state.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from ...errors import SlurmError, SlurmUnreachable
from .companions import Asked, Companion, Files, Silences
from .getting import TRIES_FOR_S

if TYPE_CHECKING:
    from .getting import Getting
    from .reading import Slurm
    from .seen import Snapshot
    from .wishes import Needs

FILES_EVERY_S = 0.01
STRAY_S = 10.0  # how long agents may take to have Slurm end their companions
QUEUE_EVERY_S = 0.5
LONGEST_BACK_OFF_S = 30.0


@dataclass(frozen=True)
class State:
    """What is known of the companions and of the queue.

    Attributes
    ----------
    companions : mapping
        The companions by number, as their files tell.
    needs : Needs or None
        What a companion needs, once Slurm was asked.
    snapshot : Snapshot or None
        The queue, once it has been read.
    read_s : float
        When that reading was begun, in seconds since 1970.
    trouble : str
        Why the queue can't be read just now; empty if it can.
    """

    companions: Mapping[int, Companion]
    needs: Needs | None = None
    snapshot: Snapshot | None = None
    read_s: float = 0.0
    trouble: str = ""


class Desk:
    """Reads and orders, in three threads.

    Parameters
    ----------
    slurm : Slurm
        How Slurm is spoken to.
    files : Files
        The companions' files.
    needs : callable
        Asks Slurm what a companion needs.
    getting : Getting
        How companions are got.
    """

    def __init__(self, slurm: Slurm, files: Files, needs: Callable[[], Needs], getting: Getting) -> None:
        self._slurm = slurm
        self._files = files
        self._needs = needs
        self._getting = getting
        self._silences = Silences()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.state = State(files.read())
        for target in (self._read_files, self._read_queue, self._carry_orders):
            threading.Thread(target=target, name=f"slurm {target.__name__}", daemon=True).start()

    # --- orders -------------------------------------------------------------------------------------------------------

    def ask(self, number: int, ranks: int, options: tuple[str, ...]) -> None:
        """Ask for companion `number`. It is written down before this returns."""
        asked = Asked(ranks=ranks, time=time.time())
        self._files.ask(number, asked)
        options = (*options, f"--comment={self._files.name(number)}", f"--chdir={self._files.folder}")
        self._orders.put(lambda: self._get(number, asked, options))

    def release(self, number: int) -> None:
        """Give companion `number` back; its agent ends it at once when nobody runs there."""
        self._files.release(number)

    def cancel(self, number: int, why: str) -> None:
        """Have Slurm end companion `number`, which is pending, or whose agent is gone."""
        self._files.release(number)  # if it begins in this moment, its agent ends it
        self._orders.put(lambda: self._cancel(number, why))

    def give_up(self, number: int, why: str) -> None:
        """Do the same for one that has been pending for too long, once Slurm has said why it is."""
        self._orders.put(lambda: self.cancel(number, why + self._why_pending(number)))

    def _carry_orders(self) -> None:
        while True:
            order = self._orders.get()
            until, pause = time.monotonic() + TRIES_FOR_S, 0.5
            while True:
                try:
                    order()
                except SlurmUnreachable:
                    if time.monotonic() > until:
                        break
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_BACK_OFF_S)
                    continue
                except (SlurmError, OSError):
                    pass  # what came of it stands in the companion's files
                break

    def _get(self, number: int, asked: Asked, options: tuple[str, ...]) -> None:
        if self._files.path(number, "release").exists():
            self._files.end(number, "it was withdrawn")
        else:
            self._getting.get(number, asked, options, self._known)

    def _known(self, number: int) -> int | None:
        snapshot = self.state.snapshot
        name = self._files.name(number)
        found = [job.id for job in snapshot.jobs if job.comment == name] if snapshot is not None else []
        return found[0] if found else None

    def _cancel(self, number: int, why: str) -> None:
        companion = self._files.read().get(number)
        if companion is None or companion.end is not None:
            return
        if allocation := self._allocation(companion):
            self._slurm.cancel([allocation])
        self._files.end(number, why)

    def _allocation(self, companion: Companion) -> int | None:
        return companion.asked.allocation or self._known(companion.number)

    def _why_pending(self, number: int) -> str:
        """Return what Slurm says of a companion that is pending, to be added to something; nothing if it says nothing."""
        companion = self._files.read().get(number)
        with contextlib.suppress(SlurmError):
            if companion is not None and (allocation := self._allocation(companion)):
                job = self._slurm.own_job(allocation)
                if job is not None and job.pending:
                    return f": {job.reason or 'Slurm gives no reason'}"
        return ""

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_files(self) -> None:
        while True:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                companions = self._files.read()
                for number in self._silences.new(companions, time.monotonic()):
                    self.cancel(number, "its agent has given no sign of life any more")
                if companions != self.state.companions:
                    with self._lock:
                        self.state = replace(self.state, companions=companions)
            time.sleep(FILES_EVERY_S)

    def _read_queue(self) -> None:
        pause = QUEUE_EVERY_S
        while True:
            begun, read_s = time.monotonic(), time.time()
            try:
                needs = self.state.needs or self._needs()
                snapshot = self._slurm.snapshot()
            except (SlurmError, OSError) as problem:  # the run directory can't be written, for a while
                pause = min(2 * pause, LONGEST_BACK_OFF_S)
                with self._lock:
                    self.state = replace(self.state, trouble=str(problem))
            else:
                took = time.monotonic() - begun
                # A slow controller is asked less often.
                pause = min(max(QUEUE_EVERY_S, 10 * took), LONGEST_BACK_OFF_S)
                with self._lock:
                    self.state = replace(self.state, needs=needs, snapshot=snapshot, read_s=read_s, trouble="")
                self._note_limits(snapshot)
                self._end_strays(snapshot)
            time.sleep(pause)

    def _end_strays(self, snapshot: Snapshot) -> None:
        """End allocations of companions that have ended: a salloc that is killed may leave what it was granted."""
        over = {self._files.name(n): c.ended_s for n, c in self.state.companions.items() if c.end is not None}
        with contextlib.suppress(SlurmError):
            self._slurm.cancel(job.id for job in snapshot.live(over) if time.time() - over[job.comment] > STRAY_S)

    def _note_limits(self, snapshot: Snapshot) -> None:
        """Write down when companions end at the latest, where that is new."""
        for companion in self.state.companions.values():
            if companion.held is None or companion.end is not None or not companion.asked.allocation:
                continue
            job = snapshot.job(companion.asked.allocation)
            if job is not None and job.running and (job.end_s or 0.0) != companion.asked.end_s:
                with contextlib.suppress(OSError):
                    self._files.limit(companion, job.end_s or 0.0)
