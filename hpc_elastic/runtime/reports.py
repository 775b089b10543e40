"""What the leader reports: events, the status, the progress on the terminal."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from .. import events
from ..leftovers import HOST
from ..processes import is_zombie
from ..progress import Progress
from ..rundir import Status
from ..streams import put
from .session import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from ..comm.world import World
    from ..model import Cursor, Member
    from ..redistribute import DistributedArray
    from ..rundir import RunDirectory
    from .agreement import Verdict
    from .plan import Office, Plan, Tally
    from .session import Session

RECORDED_S, LATE_S, LOOK_S = 0.2, 2.0, 0.002
POINTS = 256
FULL = (errno.ENOSPC, errno.EDQUOT)


def await_ends(
    run: RunDirectory,
    members: Collection[Member],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the guards of `members`, which are lost, have recorded how they ended; for a moment only.

    A bit longer for a guard that is there, but is not let run by a busy machine: its rank is a zombie until it takes note.
    """
    begun = clock()
    while unsaid := [member for member in members if run.end_of(member.id) is None]:
        late = any(member.host == HOST and is_zombie(member.pid) for member in unsaid)
        if clock() >= begun + (LATE_S if late else RECORDED_S):
            break
        pause(LOOK_S)


class Here(msgspec.Struct, frozen=True):
    """Where the job is, at a turn of its loop."""

    loop: int
    cursor: Cursor
    tally: Tally
    epochs: int
    steps: int
    unit: str
    arrays: tuple[DistributedArray, ...] = ()
    names: tuple[str, ...] = ()

    def tells(self, step: int) -> bool:
        """Tell whether metrics are reported when `step` steps are done: some `POINTS` times a loop."""
        return step == self.steps or step % -(-self.steps // POINTS) == 0


class Log(events.EventLog):
    """The events of a leader, which are left out where the disk is full: the job needs none of them to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.full = False

    def write(self, event: events.Event) -> None:
        """Append `event` if there is room, and say once that there is none."""
        with self.room():
            super().write(event)

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Go on though what is written in the block finds the disk full."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not self.full:
                put(sys.stderr, f"hpc_elastic: the run directory is not written until there is room: {error.strerror}\n")
            self.full = True


class Reports:
    """Writes for the leader."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.log = Log(session.run.events)
        self._progress = Progress.of_leader(session.config.progress)

    def say(self, text: str) -> None:
        """Tell people, on the terminal and in the events."""
        self.log.write(events.Notice(text=text))
        put(sys.stderr, f"hpc_elastic: {text}\n")

    def measured(self, here: Here, step: int, ranks: int, metrics: dict[str, float], samples: int = 0) -> None:
        """Report metrics when `step` steps are done: means over `samples`, or the script's own."""
        self.log.write(
            events.Measured(
                loop=here.loop, epoch=here.cursor.epoch, step=step, samples=samples, ranks=ranks, metrics=metrics
            )
        )

    def epoch(self, here: Here, ranks: int) -> None:
        """Report the end of an epoch."""
        self.log.write(
            events.Epoch(
                epoch=here.cursor.epoch,
                step=here.cursor.step,
                ranks=ranks,
                samples=here.tally.samples,
                seconds=time.time() - here.tally.began,
                metrics=here.tally.means(),
            )
        )

    def resized(self, plan: Plan, after: int, stages: dict[str, float], state_bytes: int, moved_bytes: int) -> None:
        """Report a resize that was carried out."""
        before = len(plan.members) - plan.joining
        self.log.write(
            events.Resized(
                generation=plan.generation,
                step=plan.cursor.step,
                epoch=plan.cursor.epoch,
                before=before,
                after=after,
                joined=tuple(member.id for member in plan.members[before:]),
                left=tuple(plan.members[rank].id for rank in plan.leavers),
                reason=plan.reason,
                stages=stages,
                standstill_s=sum(stages.values()),
                wait_s=plan.wait_s,
                state_bytes=state_bytes,
                moved_bytes=moved_bytes,
            )
        )

    def lost(self, verdict: Verdict, here: Here, how: str, seconds: dict[str, float]) -> None:
        """Report a loss that the job goes on after."""
        after = len(verdict.survivors)
        before = after + len(verdict.lost)
        self.log.write(
            events.Lost(
                step=here.cursor.step,
                generation=verdict.generation + 1,
                members=tuple(member.id for member in verdict.lost),
                how=how,
                before=before,
                after=after,
                lost_steps=int(verdict.redo >= 0),
                seconds=seconds,
                recovery_s=sum(seconds.values()),
            )
        )
        # Where they begin again, that is said when it is known where.
        goes_on = "" if verdict.refused else f", going on at step {here.cursor.step}"
        put(sys.stderr, f"hpc_elastic: {how}: {before} -> {after} ranks{goes_on}\n")

    def status(self, here: Here, world: World, office: Office, state: str, under_way: str = "") -> None:
        """Rewrite the status, and show it."""
        self._progress.show(self.record(here, world, office, state, under_way))

    def record(self, here: Here, world: World, office: Office, state: str, under_way: str = "") -> Status:
        """Rewrite the status; before a word about a step, so that a supervisor shows no earlier one after it."""
        seconds = time.time() - here.tally.began
        status = Status(
            state=state,
            time=time.time(),
            started=self._session.started,
            generation=world.generation.number,
            ranks=world.size,
            members=world.generation.members,
            parked=len(office.parked),
            epoch=here.cursor.epoch,
            epochs=here.epochs,
            step=here.cursor.step,
            steps=here.steps,
            unit=here.unit,
            samples_per_s=here.tally.samples / seconds if seconds > 0 else 0.0,
            metrics=here.tally.means(),
            under_way=under_way,
            peak_bytes=max(office.peak_bytes, peak_bytes()),
        )
        # How the job has ended must be known, or it is started again.
        with self.log.room() if state == "running" else contextlib.nullcontext():
            self._session.run.put_status(status)
            self.log.full = False
        return status

    def end(self, here: Here, world: World, office: Office, *, stopped: bool) -> None:
        """Report the end of the job."""
        seconds = self._session.seconds()
        self.log.write(events.Ended(steps=here.cursor.step, seconds=seconds, ranks=world.size, stopped=stopped))
        self.status(here, world, office, "stopped" if stopped else "ended")
        self._progress.close()
