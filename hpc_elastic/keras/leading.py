"""Callbacks for what should be done once: on the leader, whoever that is at the moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

from ..errors import ConfigError
from .state import Callbacks

if TYPE_CHECKING:
    from ..runtime.job import Job


def is_past(job: Job, epoch: float) -> bool:
    """Tell whether an epoch was done before this rank came, or came back, so that `fit` passes over it."""
    return epoch < job.here.cursor.epoch


HOOKS = tuple(name for name in dir(keras.callbacks.Callback) if name.startswith("on_"))


class OnLeader(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that passes Keras's calls on to another one, such as ``TensorBoard``, on the leader alone.

    A rank that becomes the leader calls its ``on_train_begin`` then, or ``on_test_begin`` and so on. What the callback
    remembers comes along, as it was at the end of the last epoch, if this one is named in ``Elasticity(job, keep=[…])``.

    Parameters
    ----------
    job : Job
        What `he.run` has given to the function.
    callback : keras.callbacks.Callback
        What does something once.

    Attributes
    ----------
    callback : keras.callbacks.Callback
        The same.

    Raises
    ------
    ConfigError
        If it is one that must not work on one rank alone.
    """

    def __init__(self, job: Job, callback: Any) -> None:
        super().__init__()
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ConfigError(
                "he.keras.OnLeader(BackupAndRestore) would load weights on one rank alone: leave it out, checkpoints of the "
                "job are what it begins again from"
            )
        self._job, self.callback = job, callback
        self._begun: set[str] = set()
        self._epoch = math.inf  # of the fit under way
        for name in HOOKS:
            setattr(self, name, self._hook(name))

    @property
    def kept(self) -> list[Any]:
        """The callback, if what it remembers should come along: a `CSVLogger` finds in its file what there is."""
        return [] if isinstance(self.callback, keras.callbacks.CSVLogger) else [self.callback]

    def set_params(self, params: dict[str, Any]) -> None:
        """Pass the parameters on."""
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model: Any) -> None:
        """Pass the model on."""
        super().set_model(model)
        self.callback.set_model(model)

    def _hook(self, name: str) -> Callable[..., None]:
        kind = next((kind for kind in ("test", "predict") if f"_{kind}_" in name), "train")
        begin, end, own = f"on_{kind}_begin", f"on_{kind}_end", getattr(self.callback, name)

        def hook(*arguments: Any, **keywords: Any) -> None:
            if name in ("on_epoch_begin", "on_train_end"):
                self._epoch = arguments[0] if name == "on_epoch_begin" else math.inf
            # At the begin of a fit a newcomer does not know yet whether it leads: it does not. One that was asleep may lead
            # when it comes back, and passes over epochs that were done meanwhile.
            elastic = self.model._initial_epoch is not None  # noqa: SLF001  (`Elasticity` sets it for its fit)
            if not self._job.leads or (elastic and is_past(self._job, self._epoch)):
                self._begun.clear()  # what it began is gone on with elsewhere
                return
            begins, begun = name == begin, kind in self._begun
            self._begun.add(kind)
            if not begun and (not begins or (kind == "train" and self.model._initial_epoch)):  # noqa: SLF001  (of fit)
                self._go_on(begin)
                if begins:
                    return
            own(*arguments, **keywords)
            if name == end:
                self._begun.discard(kind)

        return hook

    def _go_on(self, begin: str) -> None:
        """Begin where another rank has worked before: behind what it has written, and with what it remembered."""
        if isinstance(self.callback, keras.callbacks.CSVLogger):
            self.callback.append = True
        remembers = Callbacks(self.kept)
        before = remembers.state()
        getattr(self.callback, begin)()
        remembers.load(before)
