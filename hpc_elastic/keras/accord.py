"""What the ranks of a `fit` must have in common beside the sums: when it stops, and what callbacks do to rate and weights.

Keras stops where a callback of the own rank says so. Here the wish of the leader counts, on all ranks at once: at the end of
an epoch, or after the next step. What else callbacks change is compared, since ranks that differ would drift apart unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..state import Registry
from . import histories, settings
from .state import Callbacks
from .tracing import watched

if TYPE_CHECKING:
    from ..runtime.job import Job

DIGEST = 0xFFFFFF  # its square, summed over all microbatches, stays an int64
DIFFERING = (
    "the ranks' processors differ: not all have {}. TensorFlow may round otherwise there, so that the last bits can be "
    "others than on processors of one kind; with {}, set to what all have (such as AVX2), it does not"
)
ADVICE = (
    "callbacks did not do the same on all of them. Name those that remember something, such as EarlyStopping or "
    "ReduceLROnPlateau, in he.keras.Elasticity(job, keep=[…]); let none depend on the rank, its clock or its files"
)
HOOKS = ("on_train_batch_end", "on_epoch_end", "on_train_end")


class Accord:
    """That of one `fit`.

    Parameters
    ----------
    job : Job
        The ranks.
    model : keras.Model
        The model, with the history of this `fit`, whose hooks Keras calls behind those of the user's callbacks.
    weights : bool
        Whether weights are compared, at the end of epochs and of `fit`.
    led : sequence of keras.callbacks.Callback
        Those that work on the leader alone: all ranks get what they remember, at the end of epochs.

    Attributes
    ----------
    passing : bool
        True while this rank passes over what was done before it came: then it has no say, and stops for nothing.
    over : bool
        True once the loop over the steps is at its end, or the job stops.
    """

    _told: ClassVar[bool] = False  # once, also if there are many fits

    def __init__(self, job: Job, model: Any, led: Sequence[Any], *, weights: bool) -> None:
        self._job, self._model, self._weights = job, model, weights
        self._led = Registry()
        if led:
            self._led.add({"callbacks": Callbacks(led)})
        self._wish = self._stops = self.passing = self.over = False
        self._watched = watched(model.optimizer)
        self._instructions = settings.instructions() if weights else []
        self._history = model.history
        for name in HOOKS:
            setattr(self._history, name, self._behind(name))

    def _behind(self, name: str) -> Any:
        """Return a hook of the history, with what is to be done when all other callbacks are through."""
        first, then = getattr(self._history, name), getattr(self, name)

        def hook(*arguments: Any, **keywords: Any) -> None:
            first(*arguments, **keywords)
            then()

        return hook

    # --- in each step -------------------------------------------------------------------------------------------------

    def word(self, values: Iterable[NDArray[Any]]) -> NDArray[np.int64]:
        """Return what this rank has to say, to be added up over the microbatches: int64 ``[n]``.

        `values` are those of the variables that are `tracing.watched`, which the graph of a step reads at no cost.
        """
        digest = zlib.crc32(b"".join(value.tobytes() for value in values)) & DIGEST
        return np.array([1, digest, digest * digest, self._wish and self._job.leads, *self._instructions], np.int64)

    def heed(self, total: NDArray[np.int64]) -> None:
        """Stop if the leader wished to, or raise `ConfigError` if words differed: all ranks find the same in their sum."""
        count, once, squared, wishes, *having = (int(number) for number in total)
        if count * squared != once * once:  # equal if and only if all are the same
            raise ConfigError(f"the learning rates, or counts of steps, of the ranks differ: {ADVICE}")
        if wishes:
            self._stops = self._model.stop_training = True
        expected = [count * own for own in self._instructions]
        leader = self._job.membership.leader
        if having != expected and leader is not None and not Accord._told:
            Accord._told = True
            odd = [settings.INSTRUCTIONS[i] for i, (n, all_) in enumerate(zip(having, expected, strict=True)) if n != all_]
            leader.reports.say(DIFFERING.format(", ".join(odd), settings.LARGEST_SET))

    # --- behind the other callbacks -----------------------------------------------------------------------------------

    def on_train_batch_end(self) -> None:
        """Keep a wish to stop in mind, for the next step."""
        if self._model.stop_training and not (self._stops or self.over):
            self._wish = not self.passing
            self._model.stop_training = False

    def on_epoch_end(self) -> None:
        """Stop if the leader wishes to. Collective."""
        if self.over:
            return
        if self.passing:
            self._model.stop_training = False
            return
        wish = self._compared(self._wish or self._model.stop_training)
        self._stops = self._model.stop_training = wish

    def on_train_end(self) -> None:
        """See whether weights are the same still, and leave the history to ranks that pass over this `fit`. Collective."""
        for name in HOOKS:
            delattr(self._history, name)
        if self._model.stop_training and not (self._stops or self.over):
            raise ConfigError("fit can't be stopped by callbacks behind keras.callbacks.History: leave that out of the list")
        if self._job.stopped:
            return
        if self.over:
            histories.read(self._job, self._history)
        elif self._job.joined:
            self._compared(False, ends=True)

    def _compared(self, wish: bool, *, ends: bool = False) -> bool:
        """Return the leader's wish, once all ranks are known to be alike. Collective."""
        digest = 0
        for variable in self._model.weights if self._weights else ():
            digest = zlib.crc32(np.ascontiguousarray(variable).reshape(-1).view(np.uint8).data, digest)
        for variable in self._watched:
            digest = zlib.crc32(np.asarray(variable).tobytes(), digest)
        membership, words = self._job.membership, [np.empty(0, np.int64)]

        def exchange() -> None:
            # Before the others can go on: if this rank is lost, the next leader comes here, too.
            if ends and self._job.leads:
                histories.write(self._job, self._history)
            words[:] = self._job.collective.allgather(np.array([wish, digest], np.int64))
            if self._led.names():
                self._tell()

        membership.pass_by()
        while not membership.summed(self._job.here, exchange):
            pass
        if any(word[1] != digest for word in words):
            raise ConfigError(f"the weights, learning rates or counts of steps of the ranks differ: {ADVICE}")
        return bool(words[0][0])

    def _tell(self) -> None:
        """Have the leader's callbacks' state told to those of the others, which may lead next."""
        tell = self._job.collective.broadcast
        header, arrays = self._led.pack()
        text = tell(np.frombuffer(header, np.uint8))
        count = int(tell(np.array([len(arrays)]))[0])
        received = [tell(arrays[number] if self._job.leads else None) for number in range(count)]
        if not self._job.leads:
            self._led.unpack(text.tobytes(), received)
