"""The job, as the user's function sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import gpu
from ..errors import ArrayError, ConfigError, Retired
from ..model import Cursor, Generation, Member, whole
from ..redistribute import DistributedArray
from ..reduce import Sum
from ..sampler import Order
from .batches import Batches, Decode, Samples
from .collective import Collective
from .loop import Loop
from .membership import Membership
from .plan import Tally
from .reports import Here
from .saving import Saving
from .step import Batch, Step, count_steps, without_work

if TYPE_CHECKING:
    from mpi4py import MPI

    from ..comm.world import World
    from .session import Session


class Job:
    """One rank's part of an elastic job. `run` makes it and gives it to the user's function.

    Attributes
    ----------
    stopped : bool
        True once the job was asked to stop: loops end early.
    over : bool
        True once nothing more is to come on this rank.
    session, membership, collective
        The runtime's own.
    """

    def __init__(self, session: Session, membership: Membership) -> None:
        self.stopped = self.over = False
        self.session = session
        self.membership = membership
        self.collective = Collective(membership.joined)
        self._saving = Saving(session, membership)
        self._looping = False
        self._loops = self._entries = 0
        self._among: World | None = None  # of whom it was last looked whether all have work
        self._here = Here(0, Cursor(), Tally(began=time.time()), 0, 0, "samples")

    def begin_again(self) -> str:
        """Be as at the start, before the user's function is entered again; return what it begins with. Collective."""
        self._entries += 1
        self.stopped, self._looping, self._loops = False, False, 0
        self.membership.begin_again()
        return self._saving.rewind()

    # --- who is there -------------------------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """False in a newcomer until it has joined, at its first turn of `steps` or `loop`."""
        return self.membership.world is not None

    @property
    def rank(self) -> int:
        """Number of this rank, from 0; a resize can change it."""
        return self.membership.joined().rank

    @property
    def size(self) -> int:
        """Number of ranks now."""
        return self.membership.joined().size

    @property
    def leads(self) -> bool:
        """True on rank 0, for what should be done once, such as printing."""
        world = self.membership.world
        return world is not None and world.rank == 0

    @property
    def generation(self) -> Generation:
        """The membership now."""
        return self.membership.joined().generation

    @property
    def member(self) -> Member:
        """The process that this rank is."""
        return self.membership.member

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator for the user's own messages. A resize replaces it: take it anew at every turn of the loop."""
        return self.membership.joined().user

    def gpu(self) -> int:
        """Make a GPU this rank's, for CuPy, and return its number among those that are visible to this process.

        It is the one of the rank's slot: number of the slot modulo number of GPUs. To be called before arrays are made, in
        newcomers too: it needs no other rank.

        Raises
        ------
        ConfigError
            If no GPU is visible, or CuPy is not installed.
        """
        return gpu.use(max(0, self.member.slot))

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
        self.membership.registry.add(owners)

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
        arrays = self.membership.arrays
        array = DistributedArray(name or f"array{len(arrays)}", shape, dtype, lambda: self.membership.world)
        if any(array.name == other.name for other in arrays):
            raise ArrayError(f"array {array.name!r}: the name is taken")
        arrays.append(array)
        return array

    def log(self, **metrics: Any) -> None:
        """Write metrics of the script's own, such as a validation's, into the events. Inside a loop its turn counts as done.

        Only the leader writes; on the other ranks nothing happens. What is given to `Step.add` is written by itself.

        Parameters
        ----------
        **metrics : float
            Values by name, such as ``val_loss=…``.
        """
        leader = self.membership.leader
        if leader is not None:
            values = {name: float(value) for name, value in metrics.items()}
            # A checkpoint of this turn is of its beginning: after a restart from there this is said again.
            leader.reports.measured(self._here, self._here.cursor.step + self._looping, leader.world.size, values)

    def _before_the_loop(self, what: str) -> None:
        if self._looping:
            raise ConfigError(f"job.{what} inside a loop: newcomers could not know of it; call it before the loop")

    # --- loops --------------------------------------------------------------------------------------------------------

    def steps(
        self,
        data: Samples,
        epochs: int,
        batch: int | Callable[[int], int],
        *,
        shuffle: bool = True,
        seed: int | None = None,
        exact: bool = True,
        decode: Decode | None = None,
        wire: str | None = None,
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
        batch : int, or callable
            Samples in a step, over all ranks; or a function of the number of ranks that returns it. Then steps depend on the
            ranks, and so do the bits; each sample is consumed once an epoch all the same.
        shuffle : bool
            False takes the samples in their order.
        seed : int, optional
            Seed of the order; the setting ``seed`` by default.
        exact : bool
            False adds up as MPI does: then the last bits depend on the number of ranks, the library and the hosts.
        decode : callable, optional
            Called as ``decode(fields, random)`` with the fields of a microbatch, a dict of arrays, and a
            `numpy.random.Generator` whose numbers are the same at any number of ranks; returns the dict of arrays that the
            microbatch gets. It may run in a thread, while the step before is computed.
        wire : "bfloat16" or "float16", optional
            Floating-point arrays are added up with two bytes a value, so that half of the bytes travel between hosts. Each
            value and each result of an addition is rounded to the nearest: the bits are others than without, but the same
            at any number of ranks.

        Raises
        ------
        ConfigError
            If there are fewer samples in a batch than microbatches, more ranks allowed than microbatches, or `wire` is
            something else or given with ``exact=False``.
        """
        leaves, samples = self.session.config.microbatches, len(data)
        epochs = whole("job.steps: epochs", epochs)
        fixed = 0 if callable(batch) else whole("job.steps: batch", batch)

        def batch_of(ranks: int) -> int:
            return whole("job.steps: batch", batch(ranks)) if callable(batch) else fixed

        per_epoch = count_steps(samples, epochs, batch_of(1), self.session.config)
        order = Order(samples, self.session.config.seed if seed is None else seed, shuffle, data.chunk_samples)
        total = Sum(leaves, self.membership.joined, exact=exact, wire=wire)
        fingerprint = getattr(data, "fingerprint", "")
        if hasattr(data, "share_chunks"):
            data.share_chunks(str(self.session.run.path))

        def at(cursor: Cursor) -> Batch | None:
            if cursor.epoch >= epochs:
                return None
            return Batch(cursor.epoch, cursor.step, cursor.position, min(cursor.position + batch_of(self.size), samples))

        with contextlib.closing(Batches(data, order, decode)) as batches:
            for loop in self._turns(epochs * per_epoch, epochs, "samples", f"data {fingerprint[:12]}"):
                cursor = loop.here.cursor
                now = at(cursor)
                assert now is not None
                leader = self.membership.leader
                if leader is not None and leader.world is not self._among:
                    self._among = leader.world
                    if idle := without_work(min(batch_of(self.size), samples), leaves, self.size):
                        leader.reports.say(idle)
                last = now.stop == samples
                after = (
                    Cursor(cursor.epoch + 1, 0, cursor.step + 1) if last else Cursor(cursor.epoch, now.stop, cursor.step + 1)
                )
                step = Step(
                    batch=now,
                    following=partial(at, after),
                    last=last,
                    leaves=leaves,
                    batches=batches,
                    total=total,
                    summed=lambda exchange, loop=loop: self.membership.summed(loop.here, exchange),  # type: ignore[misc]
                    ledger=self._write_ledger if self.session.config.ledger else None,
                )
                yield step
                step.finish()
                loop.advance(after, step.size, step.metrics, end_of_epoch=last or step.ends)
                if step.ends:
                    break

    def _write_ledger(self, step: Step) -> None:
        attempt = len(self.session.run.attempts()) * 1000 + self.membership.vigil.losses
        step.write_ledger(self.session.run.ledger / f"{self.member.id}.i64", attempt)

    def loop(self, n: int) -> Iterator[int]:
        """Yield 0 … `n` - 1; each turn is a resize point. For jobs without a data set."""
        n = whole("job.loop: n", n)
        if n < 0:
            raise ConfigError(f"job.loop({n}): the number of turns must not be negative")
        for loop in self._turns(n, 1, "turns", f"{n} turns"):
            cursor = loop.here.cursor
            yield cursor.step
            loop.advance(Cursor(0, 0, cursor.step + 1), 1, {}, end_of_epoch=cursor.step + 1 == n)

    def _turns(self, total: int, epochs: int, unit: str, what: str) -> Iterator[Loop]:
        """Yield the loop at every turn, after the resize point."""
        if self._looping:
            raise ConfigError("a loop over job.steps or job.loop inside another: finish or leave the first one")
        self._loops += 1
        arrays = tuple(self.membership.arrays)
        # What newcomers and checkpoints must have in common with the members.
        names = (*self.membership.registry.names(), *(f"{a.name} {a.shape} {a.dtype}" for a in arrays), what)
        self._here = Here(self._loops, Cursor(), Tally(began=time.time()), epochs, total, unit, arrays, names)
        if self.stopped:
            return
        loop = Loop(self.membership, self._saving, self._here)
        self._looping, entry = True, self._entries
        try:
            going = loop.begin()
            while going:
                self._here = loop.here
                yield loop
                self._here = loop.here
                going = loop.going()
        finally:
            if entry == self._entries:  # not one of before, which is taken away only now
                self._here = loop.here
                self._looping = False
                self.stopped = loop.stopped

    # --- the end ------------------------------------------------------------------------------------------------------

    @property
    def here(self) -> Here:
        """Where this rank stands, or stood last."""
        return self._here

    @property
    def begins_at(self) -> tuple[int, Cursor]:
        """Number of the loop that begins next, and its cursor then, if the job did not start in this process."""
        return self._saving.begins_at

    def where(self) -> tuple[int, int, int]:
        """Return rank, generation and step, for messages; -1 where there is none."""
        world = self.membership.world
        if world is None:
            return -1, -1, -1
        return world.rank, world.generation.number, self._here.cursor.step

    def end(self) -> None:
        """End the job, after the user's function returned on all ranks. Collective."""
        if self.membership.retired:
            raise Retired("kept from leaving: don't catch BaseException around the loop")
        if self.membership.world is None:
            raise ConfigError(
                "the function given to he.run came to its end without a loop: newcomers join in job.steps or job.loop"
            )
        self._saving.finish()
        self.membership.end(self._here, stopped=self.stopped)
        self.over = True
        self.close()

    def close(self) -> None:
        """Let go of the others: free the communicators."""
        self.over = True
        self.membership.close()
