"""One step of training: this rank's microbatches, and the canonical sum of what was computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import Config
from ..errors import ConfigError, LostRank, StepError
from ..partition import blocks
from ..sampler import microbatches, steps_per_epoch, without_samples
from .batches import Batches, Microbatch, Share

if TYPE_CHECKING:
    from ..reduce import Sum

NONE: NDArray[np.int64] = np.empty(0, np.int64)


class Batch(NamedTuple):
    """The positions [start, stop) of an epoch's order, which one step takes; steps are counted over all epochs."""

    epoch: int
    step: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Samples in it."""
        return self.stop - self.start

    def share(self, interval: tuple[int, int], leaves: int) -> Share:
        """Return the part in the microbatches [low, high) of `leaves`."""
        first, cuts = _cuts(self.size, leaves, interval)
        return Share(self.epoch, self.step, self.start + first, cuts)


@lru_cache(maxsize=16)
def _cuts(size: int, leaves: int, interval: tuple[int, int]) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Return where a rank's part of a batch begins, and where in that its microbatches do; not those without samples."""
    low, high = interval
    cuts = microbatches(size, leaves)[low:high]
    first = cuts[0][0] if cuts else 0
    return first, tuple((i, start - first, stop - first) for i, (start, stop) in enumerate(cuts, low) if stop > start)


class Step:
    """One turn of ``job.steps``.

    Attributes
    ----------
    epoch, number : int
        Epoch, and number of the step over all epochs, from 0.
    size : int
        Samples in this step's batch, over all ranks.
    last : bool
        True if it is the last one of its epoch.
    ends : bool
        Set to True, on all ranks, it makes this step the last one of its loop, and of its epoch.
    metrics : dict of str to float
        Means over the batch of what was given to `add` by name; there after `reduce`.
    """

    def __init__(
        self,
        *,
        batch: Batch,
        following: Callable[[], Batch | None],
        leaves: int,
        batches: Batches,
        total: Sum,
        summed: Callable[[Callable[[], None]], bool],
        ledger: Callable[[Step], None] | None = None,
        last: bool = False,
    ) -> None:
        self.epoch = batch.epoch
        self.number = batch.step
        self.size = batch.size
        self.last, self.ends = last, False
        self.metrics: dict[str, float] = {}
        self.consumed: list[NDArray[np.int64]] = []
        self._batch, self._following = batch, following
        self._leaves = leaves
        self._batches = batches
        self._interval = (-1, -1)
        self._own: Share
        self._sum = total
        self._summed = summed
        self._ledger = ledger
        self._whole = False
        self._now: Microbatch | None = None
        self._added: set[int] = set()
        self._reduced = False

    @property
    def own(self) -> list[int]:
        """Numbers of this rank's microbatches that have samples."""
        return [index for index, *_ in self._share.cuts]

    @property
    def _share(self) -> Share:
        interval = self._sum.interval
        if interval != self._interval:  # at the first call, and after a loss
            self._interval, self._own = interval, self._batch.share(interval, self._leaves)
        return self._own

    def microbatches(self) -> Iterator[Microbatch]:
        """Yield this rank's share of the step's microbatches; which they are depends on the number of ranks.

        When they are used up, the sum over all ranks is done. If a rank was lost meanwhile, the others get its share here:
        all microbatches of the step come once more.
        """
        while not self._whole:
            for micro in self.begin():
                self.take(micro)
                yield micro
            self.exchange()

    def begin(self) -> list[Microbatch]:
        """Begin with the step, or begin anew after a loss: return this rank's microbatches, to be taken in their order.

        `begin`, `take` and `exchange` are for what has a loop of its own, as `hpc_elastic.keras` with its graphs.
        """
        self._added.clear()
        self._sum.drop()
        found = self._batches.take(self._share)
        if self._batches.slow and (following := self._following()) is not None:
            self._batches.begin(following.share(self._sum.interval, self._leaves))
        self.consumed = [micro.samples for micro in found]
        return found

    def take(self, micro: Microbatch | None) -> None:
        """Let `micro` be the microbatch at hand, which `add` is about."""
        self._now = micro

    def exchange(self) -> bool:
        """Do the sum; False if a rank was lost and all since `begin` has to be done anew. Collective."""
        self._now = None
        missing = [index for index, _, _ in self._share.cuts if index not in self._added]
        if missing:
            raise StepError(f"microbatch {missing[0]} had no step.add: add to every microbatch")
        if self._ledger is not None:
            self._ledger(self)
        empty = without_samples(self.size, self._leaves)
        self._whole = self._summed(lambda: self._sum.exchange(empty))
        return self._whole

    def add(self, values: Any, sums: Any = None, **metrics: Any) -> None:
        """Contribute what was computed from the microbatch at hand.

        Parameters
        ----------
        values : array, or nested lists, tuples and dicts of arrays
            Mean over the microbatch, as a gradient of a mean loss is; the same structure, shapes and dtypes every time.
            Arrays of integers are summed instead, since they have no mean of their dtype.
        sums : array, or nested lists, tuples and dicts of arrays, optional
            Sums over the microbatch, such as counts, to be summed: `reduce` then returns the pair of `values` and `sums`.
        **metrics : float
            Means over the microbatch, such as ``loss=…``; `metrics` has their means over the batch.

        Raises
        ------
        StepError
            If called outside ``step.microbatches()``, twice for one microbatch, or with another structure than before.
        """
        if self._now is None:
            raise StepError("step.add must be called inside `for micro in step.microbatches()`")
        index = self._now.index
        if index in self._added:
            raise StepError(f"step.add was called twice for microbatch {index}: add all arrays at once, as a list")
        self._added.add(index)
        self._sum.add(index, values, {k: float(v) for k, v in metrics.items()}, len(self._now) / self.size, sums)

    def reduce(self) -> Any:
        """Return the mean over the whole batch, on every rank, with the same bits at any number of ranks. Collective.

        Returns
        -------
        values
            Structure as given to `add`, of NumPy arrays that stay valid until the next step's `reduce`; with sums, the pair
            of both. They are read-only, since ranks of one host read the same memory.
        """
        if self._reduced:
            raise StepError("step.reduce was called twice")
        if not self._whole and not self.exchange():
            raise LostRank(
                "a rank was lost, and its microbatches can't be handed out: let `for micro in step.microbatches()` run to "
                "its end before step.reduce"
            )
        self._reduced = True
        values, self.metrics = self._sum.result()
        return values

    def finish(self) -> None:
        """Check that the step was used up."""
        if not self._reduced:
            raise StepError("a step ended without step.reduce: call it once after the microbatches; it is what uses them up")

    def write_ledger(self, file: Path, attempt: int) -> None:
        """Append what this rank is about to contribute to `file`: rows of epoch, step, attempt and sample, int64.

        Of the attempts at a step, the last one is the one that counts.
        """
        file.parent.mkdir(mode=0o700, exist_ok=True)
        samples = np.concatenate([NONE, *self.consumed])
        rows = np.empty((len(samples), 4), np.int64)
        rows[:] = self.epoch, self.number, attempt, 0
        rows[:, 3] = samples
        with file.open("ab") as ledger:
            ledger.write(rows.tobytes())


def count_steps(samples: int, epochs: int, batch: int, config: Config) -> int:
    """Return the steps of an epoch, or raise `ConfigError` if steps like these can't be made."""
    leaves = config.microbatches
    if epochs < 0 or batch < 1:
        raise ConfigError(f"job.steps(epochs={epochs}, batch={batch}): epochs must not be negative, batch at least 1")
    if min(samples, batch) < leaves:
        raise ConfigError(
            f"{leaves} microbatches, but only {min(samples, batch)} samples in a batch: lower the setting microbatches, "
            "or take larger batches"
        )
    if config.max_ranks > leaves:
        raise ConfigError(
            f"max = {config.max_ranks} ranks can't share {leaves} microbatches: raise microbatches or lower max"
        )
    return steps_per_epoch(samples, batch)


def without_work(size: int, leaves: int, ranks: int) -> str:
    """Return what to say if some of `ranks` have no sample of a batch of `size`, in `leaves` microbatches; else nothing."""
    empty = without_samples(size, leaves)
    idle = sum(empty.issuperset(range(low, high)) for low, high in blocks(leaves, ranks))
    if not idle:
        return ""
    if size < leaves:
        why = f"a batch of {ranks} ranks has {size} samples in {leaves} microbatches: take larger batches"
    else:
        why = f"a step has {leaves} microbatches: raise microbatches, or lower max to {leaves}"
    return f"{idle} of {ranks} ranks {'has' if idle == 1 else 'have'} nothing to do, since {why}"
