"""Callbacks for what should be done once: on the leader, whoever that is at the moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from ..runtime.job import Job

HOOKS = tuple(name for name in dir(keras.callbacks.Callback) if name.startswith("on_"))


class OnLeader(keras.callbacks.Callback):  # type: ignore[misc]
    """Callback that passes Keras's calls on to another one, such as ``TensorBoard``, on the leader alone.

    A rank that becomes the leader calls its ``on_train_begin`` then, or ``on_test_begin`` and so on.

    Parameters
    ----------
    job : Job
        What `he.run` has given to the function.
    callback : keras.callbacks.Callback
        What does something once.
    """

    def __init__(self, job: Job, callback: Any) -> None:
        super().__init__()
        self._job, self._callback = job, callback
        self._begun: set[str] = set()
        for name in HOOKS:
            setattr(self, name, self._hook(name))

    def set_params(self, params: dict[str, Any]) -> None:
        """Pass the parameters on."""
        super().set_params(params)
        self._callback.set_params(params)

    def set_model(self, model: Any) -> None:
        """Pass the model on."""
        super().set_model(model)
        self._callback.set_model(model)

    def _hook(self, name: str) -> Callable[..., None]:
        kind = next((kind for kind in ("test", "predict") if f"_{kind}_" in name), "train")
        begin, end, own = f"on_{kind}_begin", f"on_{kind}_end", getattr(self._callback, name)

        def hook(*arguments: Any, **keywords: Any) -> None:
            # At the begin of a fit a newcomer does not know yet whether it leads: it does not.
            if not self._job.leads:
                return
            if kind not in self._begun:
                self._begun.add(kind)
                if name != begin:
                    getattr(self._callback, begin)()
            own(*arguments, **keywords)
            if name == end:
                self._begun.discard(kind)

        return hook
