"""Checkpoints of a running job: when one is due, the snapshot that it is written from, and how a job begins with one."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .. import events, faults
from ..errors import CheckpointError
from ..model import Cursor
from ..places import checkpoint_folder
from .plan import Tally

if TYPE_CHECKING:
    from ..checkpoint import About, Buffers, Checkpoint, Store, Writer
    from .copies import Copies, Remembered
    from .membership import Membership
    from .reports import Here
    from .session import Session

LONGEST_WAIT_S = 600.0  # for a checkpoint that is being written when the job ends
LEAVERS_WAIT_S = 30.0  # for its part of one when a rank leaves
LOOK_S = 0.05


def bits(session: Session) -> dict[str, Any]:
    """Return the settings that fix the bits: a checkpoint made with others is of another job."""
    return {"microbatches": session.config.microbatches, "seed": session.config.seed}


class Saving:
    """One rank's part in the checkpoints of its job.

    Parameters
    ----------
    session : Session
        The run.
    membership : Membership
        The rank.
    """

    def __init__(self, session: Session, membership: Membership) -> None:
        self._session = session
        self._membership = membership
        self._writer: Writer | None = None
        self._buffers: Buffers | None = None
        self._from: Checkpoint | Remembered | None = session.checkpoint
        self._rewinds = False
        self.standstill_s: dict[tuple[int, int], float] = {}
        if membership.leader is not None:
            membership.leader.saving = self
        membership.saving = self

    # --- writing ------------------------------------------------------------------------------------------------------

    @cached_property
    def copies(self) -> Copies:
        """What this rank holds in memory."""
        from .copies import Copies

        return Copies()

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._writer is not None and self._writer.busy

    def save(self, here: Here) -> None:
        """Take a snapshot of the state at a step boundary, and have it written while the job goes on."""
        from ..checkpoint import Buffers, Rows, Writer

        begun = self._session.clock()
        faults.at("snapshot")
        member = self._membership
        world, leads = member.joined(), member.leader is not None
        if not leads and not here.arrays:
            return  # the state is the same on all ranks: one writes it
        if self._writer is None or self._buffers is None:
            self._writer = Writer(self.store())
            self._buffers = Buffers()
        if self._writer.busy:
            self._writer.abandon()  # a part of it does not come: somebody was lost meanwhile
            self._writer.wait(LONGEST_WAIT_S)
        header, arrays = member.registry.pack() if leads else (b"", [])
        copies = self._buffers.copy([*arrays, *(array.local for array in here.arrays)])
        rows = [
            Rows(array.name, array.shape, array.dtype.str, array.start, copy)
            for array, copy in zip(here.arrays, copies[len(arrays) :], strict=True)
        ]
        about = self._about(here)
        parts = tuple(range(world.size)) if here.arrays else (world.rank,)
        self._writer.write(about, world.rank, parts, header, copies[: len(arrays)], rows, commits=leads)
        self.standstill_s[here.loop, here.cursor.step] = self._session.clock() - begun

    def _about(self, here: Here) -> About:
        from ..checkpoint import About

        notes: dict[str, Any] = {"tally": msgspec.to_builtins(here.tally)}
        notes["rows"] = {array.name: array.shape[0] for array in here.arrays}
        leader = self._membership.leader
        if leader is not None:
            notes |= {"decided": leader.office.decided, "asked": leader.office.asked, "target": leader.office.target}
        return About(
            loop=here.loop,
            cursor=here.cursor,
            names=here.names,
            settings=bits(self._session),
            generation=self._membership.joined().generation.number,
            time=time.time(),
            notes=notes,
        )

    def store(self) -> Store:
        """Return where the checkpoints are."""
        from ..checkpoint import Store

        config = self._session.config
        folder = Path(self._session.script.directory) / checkpoint_folder(config, self._session.run.path)
        return Store(folder, config.checkpoints_kept)

    def copy(self, here: Here) -> None:
        """Keep copies of the state at a step boundary in the ranks' memory. Collective."""
        header, arrays = self._membership.registry.pack()
        self.copies.take(self._membership.joined(), here, self._about(here), header, arrays)

    def outcomes(self) -> list[events.Checkpointed]:
        """Return what became of the checkpoints that this rank finished since the last call."""
        if self._writer is None:
            return []
        return [
            events.Checkpointed(
                loop=done.about.loop,
                step=done.about.cursor.step,
                path=str(done.path or ""),
                seconds=done.seconds,
                bytes=done.bytes,
                standstill_s=self.standstill_s.pop((done.about.loop, done.about.cursor.step), 0.0),
                error=done.error,
            )
            for done in self._writer.done()
            if done.path or done.error  # else it was a part of one that another rank commits
        ]

    def finish(self, limit_s: float = LONGEST_WAIT_S) -> None:
        """Wait until what is being written is on the disk; parts of ranks that were lost are not waited for."""
        until = time.monotonic() + limit_s
        while self._writer is not None and not self._writer.wait(LOOK_S) and time.monotonic() < until:
            if self._membership.bereft():
                self._writer.abandon()

    # --- beginning with one -------------------------------------------------------------------------------------------

    def rewind(self) -> str:
        """Have the next loop begin with the last state that is left after a loss; return its source. Collective."""
        if self._writer is not None:
            self._writer.abandon()  # the lost rank's part of what is being written may never come
        kept = self.copies.find(self._membership.joined())
        self._rewinds, self._from = True, self._on_disk(kept.about.place if kept is not None else (0, -1)) or kept
        return str(self._from.path) if self._from is not None else "the start"

    def _on_disk(self, than: tuple[int, int]) -> Checkpoint | None:
        """Return the last checkpoint that is newer `than` a loop and step, or None. Collective."""
        from ..checkpoint import Checkpoint

        world = self._membership.joined()
        found = self.store().newest(than) if world.rank == 0 else None
        path = world.tell(str(found.path if found is not None else "").encode() if world.rank == 0 else None).decode()
        return Checkpoint.open(Path(path)) if path else None

    @property
    def begins_at(self) -> tuple[int, Cursor]:
        """Number of the loop that begins next, and its cursor then."""
        return (self._from.about.loop, self._from.about.cursor) if self._from is not None else (1, Cursor())

    def restore(self, here: Here) -> Here | None:
        """Return where a loop begins: `here`, or where the checkpoint was made that the run began with; None past it."""
        found = self._from
        if found is None or here.loop > found.about.loop:
            return here
        if here.loop < found.about.loop:
            return None
        self._from = self._session.checkpoint = None
        rewinds, self._rewinds = self._rewinds, False
        faults.at("restore")
        self._check(found, here)
        self._membership.registry.unpack(found.header, found.arrays())
        for array in here.arrays:
            array.local[:] = found.rows(array.name, array.start, array.stop)
        leader = self._membership.leader
        if leader is not None and not rewinds:
            leader.reports.log.write(
                events.Resumed(loop=here.loop, step=found.about.cursor.step, path=str(found.path), ranks=leader.world.size)
            )
        tally = msgspec.convert(found.about.notes["tally"], Tally).resumed(found.about.time, time.time())
        return msgspec.structs.replace(here, cursor=found.about.cursor, tally=tally)

    def _check(self, found: Checkpoint | Remembered, here: Here) -> None:
        if tuple(found.about.names) != here.names:
            theirs = ", ".join(name for name in found.about.names if name not in here.names)
            ours = ", ".join(name for name in here.names if name not in found.about.names)
            raise CheckpointError(
                f"checkpoint {found.path} has {theirs or 'nothing'} where the job has {ours or 'nothing'}: it is of another "
                "job, or the script has changed; start the job in a run directory of another name, or remove the checkpoint"
            )
        if found.about.settings != bits(self._session):
            raise CheckpointError(
                f"checkpoint {found.path} was made with {found.about.settings}, the job has {bits(self._session)}: other "
                "bits would come; use the same settings, or start the job in a run directory of another name"
            )
