"""The callback that makes Keras's own `fit` elastic: each of its batches is a step of `job.steps`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

import keras

from ..errors import ConfigError
from . import rules, settings
from .accord import Accord
from .dataset import Data, latest
from .evaluation import Evaluation
from .leading import OnLeader, is_past
from .state import Callbacks, State, below, prefixed
from .traced import Traced

if TYPE_CHECKING:
    from ..runtime.job import Job
    from ..runtime.step import Step


APART = 0x9E3779B97F4A7C15  # between the seeds of two fits


class Elasticity(keras.callbacks.ProgbarLogger):  # type: ignore[misc]
    """Callback for ``model.fit(he.keras.data(…), callbacks=[he.keras.Elasticity(job)])``.

    Every batch is a resize point; newcomers join where the training is, and a job that was restarted goes on at its last
    checkpoint: with epoch, metrics, history and the optimizer's state. It is the progress bar, too, on the leader alone.

    Parameters
    ----------
    job : Job
        What `he.run` has given to the function.
    keep : sequence of keras.callbacks.Callback
        Other callbacks that remember something, such as ``EarlyStopping``: newcomers and checkpoints get that. Ranks whose
        callbacks do otherwise with learning rate or weights raise `ConfigError`, and the leader's alone can stop `fit`.
    rule : "fixed", "linear", "sqrt" or "adascale"
        "fixed": the batch of `data` is that of all ranks, and the bits don't depend on them. Else it is the batch of each
        rank, and the learning rate is multiplied by the number of ranks, by its square root, or by AdaScale's gain.
    exact : bool
        False takes the sums of MPI: then the last bits depend on the number of ranks.

    Raises
    ------
    ConfigError
        If there is no such rule. What `fit` can't do in a job is refused when it begins.
    """

    def __init__(self, job: Job, *, keep: Sequence[Any] = (), rule: rules.Rule = "fixed", exact: bool = True) -> None:
        super().__init__()
        if rule not in rules.RULES:
            raise ConfigError(f"he.keras.Elasticity(rule={rule!r}): there are {', '.join(rules.RULES)}")
        self._job, self._keep, self._rule, self._exact = job, list(keep), rule, exact
        self._epoch_done = False
        self._traced: Traced | None = None
        self._compiled: tuple[Any, ...] = ()  # what it was traced of
        self._data: Data | None = None
        self._steps: Iterator[Step] | None = None
        self._first: Step | None = None  # that is to be done when its batch comes
        self._last: Step | None = None  # that was done
        self._verbose = 0
        self._epoch = self._batch = 0
        self._state = _FitState()
        self._registered = False
        self._fits = 0
        self._accord: Accord | None = None
        self._evaluation: Evaluation | None = None
        self._others: Any = None  # the model's train function without this callback
        self._keras_own: Any = None  # its test or predict function, while the own one is in its place

    @property
    def adascale_steps(self) -> float:
        """AdaScale's own count of steps, the sum of its gains, for schedules; 0 for other rules.

        It counts on through further calls of `fit`, until the model is compiled anew, or `fit` gets other data.
        A step of several ranks counts for as many of one rank as it gains; the paper's learning rates are functions of this.
        """
        adascale = self._traced.adascale if self._traced is not None else None
        return adascale.memory["steps"] if adascale is not None else 0.0

    # --- Keras's hooks ------------------------------------------------------------------------------------------------

    def set_params(self, params: dict[str, Any]) -> None:
        """Take the parameters of `fit`."""
        super().set_params(params)
        self.params = params
        self._verbose = self.verbose

    def set_model(self, model: Any) -> None:
        """Put the own train function into its place, before `fit` makes its own."""
        super().set_model(model)
        self._others = model.train_function
        model.train_function = self._train

    def on_train_begin(self, logs: Any = None) -> None:
        """Trace the step, and join: the others train on until this rank is here."""
        super().on_train_begin(logs)
        model, data = self.model, latest()
        if data is None:
            raise ConfigError("fit(callbacks=[he.keras.Elasticity(job)]) needs its samples from he.keras.data(…)")
        if len(data) != self.params["steps"]:
            raise ConfigError("fit(steps_per_epoch=…) is not for elastic jobs: an epoch has each sample of the data once")
        if self._exact:
            settings.check()
        seed = self._job.session.config.seed if data.seed is None else data.seed
        seed, self._fits = (seed + self._fits * APART) % 2**64, self._fits + 1
        self._data = data
        # Graphs are of what was compiled when they were traced.
        compiled = (model, model.optimizer, data, model._compile_loss, model._compile_metrics)  # noqa: SLF001
        traced, self._evaluation = self._traced, None
        if traced is None or compiled != self._compiled:
            traced = self._traced = Traced(model, data, self._job.session.config.microbatches, self._rule)
            self._compiled = compiled
        traced.seed = seed
        if not self._registered:
            self._registered = True
            self._job.register(**{f"{self._name()}{' on ' + settings.of_bits() if self._exact else ''}": self._state})
        kept = [one for each in self._keep for one in (each.kept if isinstance(each, OnLeader) else [each])]
        self._state.begin(model, [*kept, model.history], traced.adascale)
        led = [callback for each in self._keep if isinstance(each, OnLeader) for callback in each.kept]
        self._accord = Accord(self._job, model, led, weights=self._exact)
        epochs, batch = self.params["epochs"], rules.batch_of(self._rule, data.batch)
        self._steps = self._job.steps(
            data.samples, epochs, batch, shuffle=data.shuffle, seed=seed, exact=self._exact, decode=data.decode
        )
        self._first = next(self._steps, None)
        self._accord.over = self._first is None
        model._initial_epoch = epochs if self._first is None else self._first.epoch  # noqa: SLF001  (meant for callbacks)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take down which epoch it is."""
        self._epoch, self._batch, self._epoch_done = epoch, 0, False
        self._quiet()
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Draw the bar."""
        if self._verbose:
            self._quiet()
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Draw the bar, and put the epoch's metrics into the events, the validation's too."""
        self._quiet()
        super().on_epoch_end(epoch, logs)
        # If the job stops, the epoch is not over, and goes on when that is resumed.
        if not (self._job.stopped or self._behind):
            found = {name: value for name, value in (logs or {}).items() if name != "loss"}  # which is there
            self._job.log(**{name: value for name, value in found.items() if np.ndim(value) == 0})

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002  (Keras's signature)
        """End the loop over the steps, on all ranks."""
        self._state.end()
        if self._steps is not None:
            if self._last is not None:
                self._last.ends = self.model.stop_training
            next(self._steps, None)
            self._steps.close()  # type: ignore[attr-defined]
            self._steps = self._last = None
        self._called_in_fit = False
        self.model._initial_epoch = None  # noqa: SLF001
        self.model.train_function = None

    def on_test_begin(self, logs: Any = None) -> None:
        """Let all ranks evaluate together, if the samples come from `data`."""
        self._quiet()
        super().on_test_begin(logs)
        data = latest()
        if self._called_in_fit and (self._behind or self._job.stopped):
            self._instead("test", None, lambda: _not_of_metrics(self._state.tested or self._state.logs))
        elif data is not None:
            self._instead("test", data, lambda: self._evaluated(data))

    def on_test_end(self, logs: Any = None) -> None:
        """Put Keras's own test function back."""
        super().on_test_end(logs)
        if self._keras_own is not None:
            self.model.test_function, self._keras_own = self._keras_own, None
        self._leave()

    def on_predict_begin(self, logs: Any = None) -> None:
        """Let all ranks predict together, if the samples come from `data`."""
        self._quiet()
        super().on_predict_begin(logs)
        data = latest()
        if data is not None:
            self._instead("predict", data, lambda: self._evaluating().predict(data))

    def on_predict_end(self, logs: Any = None) -> None:
        """Put Keras's own predict function back."""
        super().on_predict_end(logs)
        if self._keras_own is not None:
            self.model.predict_function, self._keras_own = self._keras_own, None
        self._leave()

    def _instead(self, what: str, data: Data | None, compute: Callable[[], Any]) -> None:
        """Have Keras call `compute`, once for the whole set, in place of its own function; unless it has other samples."""
        own = self._keras_own = getattr(self.model, f"{what}_function")
        stop = {"test": "stop_evaluating", "predict": "stop_predicting"}[what]

        def function(batches: Any) -> Any:
            if data is not None and not data.in_use:  # Keras was given this before, without the callback
                setattr(self.model, stop, False)
                return own(batches)
            return compute()

        setattr(self.model, f"{what}_function", function)
        setattr(self.model, stop, True)

    def _evaluated(self, data: Data) -> dict[str, Any]:
        logs = self._evaluating().evaluate(data)
        if self._called_in_fit:
            self._state.tested = {name: np.asarray(value) for name, value in logs.items()}
        return logs

    def _evaluating(self) -> Evaluation:
        if self._evaluation is None or self._evaluation.model is not self.model or not self._called_in_fit:
            if self._exact:
                settings.check()
            self._evaluation = Evaluation(self._job, self.model)
        return self._evaluation

    def _leave(self) -> None:
        """Let a `fit` without this callback have its own train function, also one from which this is called."""
        if not self._called_in_fit:
            self.model.train_function = self._others

    def _quiet(self) -> None:
        self.verbose = self._verbose if self._job.leads and not self._behind else 0
        if self.progbar is not None:
            self.progbar.verbose = self.verbose

    def _name(self) -> str:
        taken = {name.split(" on ")[0] for name in self._job.membership.registry.names()}
        return next(name for name in ("keras", *(f"keras{n}" for n in range(2, 1000))) if name not in taken)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _train(self, iterator: Any) -> Any:
        """Stand in for Keras's train function: do one step, or as many as are to be done in one execution."""
        assert self._traced is not None
        assert self._data is not None
        assert self._accord is not None
        if not self._batch:
            self._check(iterator)
        for _ in range(min(self.model.steps_per_execution, len(self._data) - self._batch)):
            step = self._next()
            self._batch += 1
            if step is not None:
                self._last = step
                self._state.logs, words = self._traced.run(step, self._accord.word)
                self._accord.heed(words)
                self._epoch_done = step.last
            if self.model.stop_training:
                break
        return _not_of_metrics(self._state.logs) if self._accord.passing else self._state.logs

    def _check(self, iterator: Any) -> None:
        """Refuse what Keras would have done with the data, and this callback does not."""
        assert self._data is not None
        if not self._data.in_use:
            raise ConfigError("fit was not given the he.keras.data(…) that was made last")
        if len(keras.tree.flatten(iterator.element_spec)) != len(self._data.names):
            raise ConfigError(
                "fit(class_weight=…) is not for elastic jobs: give he.keras.data(weights=…) the name of a field"
            )

    @property
    def _behind(self) -> bool:
        """True in an epoch of `fit` that is passed over."""
        return self._called_in_fit and is_past(self._job, self._epoch)

    @property
    def _here(self) -> int:
        """Number of the step that `fit` is at."""
        return self._epoch * len(self._data) + self._batch if self._data is not None else 0

    def _next(self) -> Step | None:
        """Return the step of this batch; None if it was done before this rank came, or if the job stops."""
        assert self._data is not None
        assert self._steps is not None
        assert self._accord is not None
        if self._epoch_done:
            return None
        if self._first is None:
            self._first = next(self._steps, None)
        step = self._first
        if step is None:
            self._accord.over = self.model.stop_training = True
            return None
        fixed = self._rule == rules.FIXED  # else steps are fewer than batches with more ranks: those left are passed over
        ahead = step.number - self._here if fixed else step.epoch - self._epoch
        if ahead < 0:
            raise ConfigError(
                "fit(initial_epoch=…) is not for elastic jobs, which know themselves where to go on: leave it out"
            )
        self._accord.passing = ahead > 0
        if ahead:
            return None
        self._state.put_back()
        self._first = None
        return step


class _FitState:
    """What newcomers and checkpoints get of a `fit`: the model's state, and what its callbacks remember.

    Some of it is loaded before Keras resets it, at the beginning of an epoch; so it is put back afterwards.
    """

    def __init__(self) -> None:
        self._received: dict[str, Any] = {}
        self._running = False
        self.logs: dict[str, Any] = {}  # of the last step
        self.tested: dict[str, Any] = {}  # of the last validation

    def begin(self, model: Any, callbacks: Sequence[Any], adascale: rules.AdaScale | None) -> None:
        """Be that of this `fit`."""
        self._model, self._adascale, self._running = model, adascale, True
        self._own = State(model, model.optimizer)
        self._callbacks = Callbacks(callbacks)
        self.logs, self.tested = {}, {}

    def state(self) -> dict[str, Any]:
        """Return all of it."""
        rule = self._adascale.memory if self._adascale is not None else {}
        return (
            prefixed("model", self._own.state())
            | prefixed("callbacks", self._callbacks.state())
            | prefixed("rule", dict(rule))
            | prefixed("logs", {name: np.asarray(value) for name, value in self.logs.items()})
            | prefixed("tested", self.tested)
        )

    def load(self, state: dict[str, Any]) -> None:
        """Take what was received."""
        self._own.load(below("model", state))
        if self._adascale is not None:
            self._adascale.memory = below("rule", state)
        self.logs = {name: value.tolist() for name, value in below("logs", state).items()}
        self.tested = {name: value.copy() for name, value in below("tested", state).items()}
        self._received = {
            key: value.copy() if hasattr(value, "copy") else value for key, value in below("callbacks", state).items()
        }
        self._fleeting = [(variable, variable.numpy()) for variable in self._reset()]
        if not self._running:  # it is another model's fit that is under way
            self.put_back()

    def put_back(self) -> None:
        """Put back what Keras and its callbacks have reset since."""
        if self._received:
            self._callbacks.load(self._received)
            for variable, value in self._fleeting:
                variable.assign(value)
            self._received = {}

    def end(self) -> None:
        """Be that of a `fit` that has ended."""
        self.put_back()
        self._running = False

    def _reset(self) -> list[Any]:
        rate = self._model.optimizer.learning_rate
        return [*self._model.metrics_variables, *([rate] if hasattr(rate, "assign") else [])]


def _not_of_metrics(logs: dict[str, Any]) -> Any:
    """Return logs as Keras takes them as they are; in place of a dict it would read the metrics, which are reset."""
    return MappingProxyType(logs)
