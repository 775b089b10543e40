"""The job, as the user's function sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike

from ..comm.door import Door
from ..comm.messages import Report
from ..comm.waiting import Watch
from ..errors import ArrayError, ConfigError, JobError, Retired
from ..model import Cursor, Generation, Member
from ..redistribute import DistributedArray
from ..reduce import Sum
from ..sampler import Order, microbatches
from ..state import Registry
from .leader import Leader
from .offices import first_office, make_leader
from .plan import Plan, Tally
from .reports import Here
from .session import Session, peak_bytes
from .step import Samples, Step, count_steps
from .transition import Outcome, Stages, Transition

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.world import World

NOTHING, RESIZE, STOP, END = 0, 1, 2, 3


class Job:
    """One rank's part of an elastic job. `run` makes it and gives it to the user's function.

    Attributes
    ----------
    stopped : bool
        True once the job was asked to stop: loops end early.
    retired, over : bool
        True once this rank has left, and once nothing more is to come in it.
    entered : bool
        True as soon as the members count on this rank: before `joined` in a newcomer that receives its state.
    """

    def __init__(self, session: Session, world: World | None, door: Door | None, member: Member) -> None:
        self.stopped = False
        self._session = session
        self._world = world
        self._door = door
        self._member = member
        self.entered = world is not None
        self.retired = self.over = self._looping = False
        self._registry = Registry()
        self._arrays: list[DistributedArray] = []
        self._tethers: dict[int, World] = {}
        self._leader: Leader | None = None
        self._loop = 0
        self._here = Here(0, Cursor(), Tally(began=time.time()), 0, 0, "samples")
        self._watch = world.watch if world is not None else Watch(session.check)
        if world is not None and world.rank == 0:
            self._leader = make_leader(session, world, first_office(session, world), self._tethers)

    # --- who is there -------------------------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """False in a newcomer until it has joined, at its first turn of `steps` or `loop`."""
        return self._world is not None

    def _joined(self) -> World:
        if self._world is None:
            raise JobError(
                "this rank has not joined the job yet: it does so where the loop over job.steps or job.loop begins"
            )
        return self._world

    @property
    def rank(self) -> int:
        """Number of this rank, from 0; a resize can change it."""
        return self._joined().rank

    @property
    def size(self) -> int:
        """Number of ranks now."""
        return self._joined().size

    @property
    def leads(self) -> bool:
        """True on rank 0, for what should be done once, such as printing."""
        return self._world is not None and self._world.rank == 0

    @property
    def generation(self) -> Generation:
        """The membership now."""
        return self._joined().generation

    @property
    def member(self) -> Member:
        """The process that this rank is."""
        return self._member

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator for the user's own messages. A resize replaces it: take it anew at every turn of the loop."""
        return self._joined().user

    # --- what newcomers receive ---------------------------------------------------------------------------------------

    def register(self, **owners: Any) -> None:
        """Name what newcomers receive when they join: NumPy arrays, dicts, or objects with ``state()`` and ``load()``.

        Every rank registers the same names before the loop. Arrays and dicts are changed in place.

        Raises
        ------
        ConfigError
            If a name is taken, or a value has no state.
        """
        self._before_the_loop("register")
        self._registry.add(owners)

    def array(self, shape: Sequence[int], dtype: DTypeLike = np.float64, name: str = "") -> DistributedArray:
        """Return a distributed array of zeros: every rank holds one block of its rows, and a resize redistributes them.

        Parameters
        ----------
        shape : sequence of int
            Global shape; the first axis is cut into blocks.
        dtype
            Element type.
        name : str
            Name in messages; every rank makes the same arrays in the same order, before the loop.
        """
        self._before_the_loop("array")
        array = DistributedArray(name or f"array{len(self._arrays)}", shape, dtype, lambda: self._world)
        if any(array.name == other.name for other in self._arrays):
            raise ArrayError(f"array {array.name!r}: the name is taken")
        self._arrays.append(array)
        return array

    def _before_the_loop(self, what: str) -> None:
        if self._looping:
            raise ConfigError(f"job.{what} inside a loop: newcomers could not know of it; call it before the loop")

    # --- loops --------------------------------------------------------------------------------------------------------

    def steps(
        self, data: Samples, epochs: int, batch: int, *, shuffle: bool = True, seed: int | None = None
    ) -> Iterator[Step]:
        """Yield the steps of `epochs` passes over `data`; each turn is a resize point.

        Every sample is consumed exactly once an epoch, whatever the number of ranks; the last batch of an epoch is
        smaller where the samples don't divide.

        Parameters
        ----------
        data : ShardSet or other data set
            Has a length and ``gather(samples)``.
        epochs : int
            Number of passes.
        batch : int
            Samples in a step, over all ranks.
        shuffle : bool
            False takes the samples in their order.
        seed : int, optional
            Seed of the order; the setting ``seed`` by default.

        Raises
        ------
        ConfigError
            If there are fewer samples in a batch than microbatches, or more ranks allowed than microbatches.
        """
        leaves = self._session.config.microbatches
        per_epoch = count_steps(len(data), epochs, batch, self._session.config)
        order = Order(len(data), self._session.config.seed if seed is None else seed, shuffle, data.chunk_samples)
        total = Sum(leaves, self._joined)
        fingerprint = getattr(data, "fingerprint", "")
        for cursor in self._turns(epochs * per_epoch, epochs, "samples", f"data {fingerprint[:12]}"):
            start = cursor.position
            size = min(batch, len(data) - start)
            cuts = microbatches(start, start + size, leaves)
            step = Step(epoch=cursor.epoch, number=cursor.step, cuts=cuts, order=order, data=data, total=total)
            yield step
            step.finish()
            if self._session.config.ledger:
                step.write_ledger(self._session.run.ledger / f"{self._member.id}.i64")
            last = start + size == len(data)
            after = (
                Cursor(cursor.epoch + 1, 0, cursor.step + 1) if last else Cursor(cursor.epoch, start + size, cursor.step + 1)
            )
            self._advance(after, size, step.metrics, end_of_epoch=last)

    def loop(self, n: int) -> Iterator[int]:
        """Yield 0 … `n` - 1; each turn is a resize point. For jobs without a data set."""
        if n < 0:
            raise ConfigError(f"job.loop({n}): the number of turns must not be negative")
        for cursor in self._turns(n, 1, "turns", f"{n} turns"):
            yield cursor.step
            self._advance(Cursor(0, 0, cursor.step + 1), 1, {}, end_of_epoch=cursor.step + 1 == n)

    def _turns(self, total: int, epochs: int, unit: str, what: str) -> Iterator[Cursor]:
        """Yield the cursor at every turn, after the resize point."""
        if self._looping:
            raise ConfigError("a loop over job.steps or job.loop inside another: finish or leave the first one")
        self._loop += 1
        self._looping = True
        try:
            yield from self._loop_turns(total, epochs, unit, what)
        finally:
            self._looping = False

    def _loop_turns(self, total: int, epochs: int, unit: str, what: str) -> Iterator[Cursor]:
        arrays = tuple(self._arrays)
        # What newcomers must have in common with the members.
        names = (*self._registry.names(), *(f"{a.name} {a.shape} {a.dtype}" for a in arrays), what)
        self._here = Here(self._loop, Cursor(), Tally(began=time.time()), epochs, total, unit, arrays, names)
        if self._world is None:
            called = self._join()
            if called == "go":
                raise Retired("sent away before joining")
            if called == "skip":
                return
        elif total and not self._resize_point():
            return
        while self._here.cursor.step < total and not self.stopped:
            yield self._here.cursor
            if self._here.cursor.step < total and not self._resize_point():
                return

    def _advance(self, cursor: Cursor, samples: int, metrics: dict[str, float], *, end_of_epoch: bool) -> None:
        here = self._here
        tally = here.tally.plus(samples, metrics)
        if end_of_epoch and self._leader is not None:
            self._leader.reports.epoch(replace(here, tally=tally), self._leader.world.size)
        if end_of_epoch and cursor.step < here.steps:
            tally = Tally(began=time.time())
        self._here = replace(here, cursor=cursor, tally=tally)

    # --- resize points ------------------------------------------------------------------------------------------------

    def _resize_point(self) -> bool:
        """Carry out what the leader decided; False if the job stops here."""
        world = self._joined()
        if world.size == 1 and self._leader is None:
            raise JobError("no rank leads")
        word = np.zeros(1, np.int64)
        order: Plan | str | None = None
        if self._leader is not None:
            self._session.check()
            order = self._leader.turn(self._here)
            word[0] = NOTHING if order is None else STOP if order == "stop" else RESIZE
        world.fill(word)
        if word[0] == STOP:
            self.stopped = True
            return False
        if word[0] == RESIZE:
            return self._resize(world, order if isinstance(order, Plan) else None)
        if word[0] == END:
            raise JobError(f"rank 0 left the loop at step {self._here.cursor.step}, and this rank did not: all have to")
        return True

    def _resize(self, world: World, own_plan: Plan | None) -> bool:
        stages = Stages(self._session.clock)
        with stages.stage("drain"):
            plan = msgspec.msgpack.decode(
                world.tell(msgspec.msgpack.encode(own_plan) if own_plan is not None else None), type=Plan
            )
            arrivals = self._leader.arrivals() if self._leader is not None else None
        transition = Transition(self._registry, self._arrays, stages)
        outcome = transition.of_member(world, plan, arrivals)
        return self._settle(plan, outcome, stages)

    def _settle(self, plan: Plan, outcome: Outcome, stages: Stages) -> bool:
        """Go on in the next generation; False if this rank has to leave its loop."""
        if outcome.tether is not None:
            self._tethers[plan.generation] = outcome.tether
        if outcome.world is None:
            return self._leave(plan)
        self._world = outcome.world
        if outcome.world.rank != 0:
            self._leader = None
        elif self._leader is None:
            self._leader = make_leader(self._session, outcome.world, plan.office, self._tethers)
        else:
            self._leader.world = outcome.world
        if self._leader is not None:
            self._leader.resized(plan, stages.seconds, outcome.state_bytes, outcome.moved_bytes)
        return True

    def _leave(self, plan: Plan) -> bool:
        """End this rank's part: unwind, or sleep until it is wanted again; False if its loop has ended meanwhile."""
        self._world = self._leader = None
        if not self._member.parks:
            self.retired = True
            raise Retired(f"process {self._member.id} left the job at step {plan.cursor.step}")
        self._session.record(self._member, "parked")
        tether = self._tethers[plan.generation]
        while True:
            self._door, options = Door.parked(tether.comm, self._session.run, self._watch, self._doze)
            self._member = msgspec.structs.replace(self._member, slot=options.slot)
            self._session.began = self._session.clock()
            called = self._join()
            if called != "go":  # else the resize was given up: back to sleep
                return called == "enter"

    def _doze(self) -> None:
        time.sleep(0.05)
        self._session.check()
        status = self._session.run.status()
        if status is not None and status.state in ("ended", "stopped"):
            raise Retired("the job ended while this rank was parked")

    def _join(self) -> str:
        """Report ready, wait to be called, and come in; return the last call: "enter", "skip" this loop, or "go" away."""
        assert self._door is not None
        door, stages = self._door, Stages(self._session.clock)
        warm_s = self._session.clock() - self._session.began
        report = Report(
            member=self._member,
            loop=self._loop,
            names=list(self._here.names),
            stages={"warm": warm_s},
            peak_bytes=peak_bytes(),
        )
        door.report(report)
        while True:
            call = door.called()
            if call.order == "skip":
                return "skip"
            if call.order == "go":
                door.close()
                return "go"
            if call.order == "enter":
                self.entered = True
                break
        transition = Transition(self._registry, self._arrays, stages)
        plan, outcome = transition.of_newcomer(door, self._watch)
        self._door = None
        if plan.loop != self._loop:
            raise JobError(f"joined in loop {plan.loop} while standing in loop {self._loop}")
        self._here = replace(self._here, cursor=plan.cursor, tally=plan.tally)
        self._session.record(self._member, "member")
        return "enter" if self._settle(plan, outcome, stages) else "skip"

    # --- the end ------------------------------------------------------------------------------------------------------

    def where(self) -> tuple[int, int, int]:
        """Return rank, generation and step, for messages; -1 where there is none."""
        if self._world is None:
            return -1, -1, -1
        return self._world.rank, self._world.generation.number, self._here.cursor.step

    def end(self) -> None:
        """End the job, after the user's function returned on all ranks. Collective."""
        if self.retired:
            raise Retired("kept from leaving: don't catch BaseException around the loop")
        if self._world is None:
            raise ConfigError(
                "the function given to he.run came to its end without a loop: newcomers join in job.steps or job.loop"
            )
        word = np.array([END if self._leader is not None else NOTHING], np.int64)
        self._world.fill(word)
        if word[0] != END:
            raise JobError(f"this rank left the loop at step {self._here.cursor.step}, and rank 0 did not: all have to")
        self._world.barrier()
        if self._leader is not None:
            self._leader.end(self._here, stopped=self.stopped)
        self._session.record(self._member, "ended")
        self.over = True
        self.close()

    def abandon(self) -> None:
        """Let newcomers under way end with the job that has failed."""
        if self._leader is not None:
            self._leader.abandon()

    def close(self) -> None:
        """Free the communicators."""
        for world in (self._world, *self._tethers.values()):
            if world is not None:
                world.close()
        self._world = None
        self._tethers.clear()
