"""One microbatch of a model's `train_step` as a graph; behind a rank's last one, the sum and the update.

The `train_step` runs as it is, but the optimizer's `apply` takes the gradients in. What else it changes, statistics of batch
normalisation, metrics and seeds, is as before when the graph ends, until the sum over all microbatches is there. So every
microbatch starts from the state of the step, whoever computes it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from ..errors import ConfigError
from . import refused, rules
from .flat import Flat
from .tracing import SEEDS, changed, collecting, loss_of, mix, only, read, seed_words, seeds_of, watched

if TYPE_CHECKING:
    from ..runtime.batches import Microbatch
    from ..runtime.step import Step
    from .dataset import Data

Word = Callable[[Sequence[np.ndarray]], np.ndarray]


class Traced:
    """The steps of `fit` for one model.

    Parameters
    ----------
    model : keras.Model
        A compiled model; built here if it is not.
    data : Data
        What it is trained on.
    leaves : int
        Number of microbatches in a step.
    rule : str
        One of `rules.RULES`.

    Attributes
    ----------
    seed : int
        That of dropout and augmentation; the callback sets it.
    adascale : AdaScale or None
        What that rule remembers.

    Raises
    ------
    ConfigError
        If its `train_step` can't be cut into microbatches, and why.
    """

    def __init__(self, model: Any, data: Data, leaves: int, rule: str = rules.FIXED) -> None:
        self.model, self.data, self.rule = model, data, rule
        refused.refuse(model, rule, leaves)
        self.optimizer = model.optimizer
        self.leaves, self.seed = leaves, 0
        self.adascale = rules.AdaScale() if rule == rules.ADASCALE else None
        model._symbolic_build(data_batch=data.packed(data.example))  # noqa: SLF001  (no public way builds metrics, too)
        refused.refuse_losses(model)
        refused.refuse_metrics(model, data)
        self._seeds = seeds_of(model)
        self._metrics, self._watched = model.metrics_variables, watched(self.optimizer)
        self._step: Step | None = None
        self._micro: Microbatch | None = None
        self._last = self._whole = False
        self._failure: BaseException | None = None
        self._forms: list[tuple[str, tuple[int, ...]]] = []
        self._loss_scale = 1.0
        self._loss = loss_of(model, self._metrics)
        specs = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in data.example]
        graph = tf.function(self._microbatch, autograph=False)
        self._graph = graph.get_concrete_function(tf.TensorSpec([2], tf.int32), *specs)
        self._refuse_strangers()
        refused.refuse_draws(self._graph.graph, "train_step")
        # Called past the matching of arguments, which costs as much as a small model's gradient.
        self._call, self._captures = self._graph.inference_fn.call_flat, self._graph.captured_inputs
        self._no_words = tf.constant((0, 0), tf.int32)

    # --- a step -------------------------------------------------------------------------------------------------------

    def run(self, step: Step, word: Word) -> tuple[dict[str, Any], np.ndarray]:
        """Do a step, and return the values of its logs, and the sum of the words of all microbatches. Collective.

        The values are floats, or arrays of metrics with several numbers. `word` is called with what is `tracing.watched`.
        """
        self._step, self._word, done = step, word, None
        if self.adascale is not None and hasattr(self.optimizer, "dynamic_scale"):
            self._loss_scale = float(self.optimizer.dynamic_scale)
        while done is None:
            done = self._attempt(step.begin())
        found, stop = {}, 0
        for name, shape in self._forms:
            start, stop = stop, stop + math.prod(shape)
            found[name] = done[start:stop].reshape(shape).copy() if shape else float(done[start])
        return found, self._words

    def _attempt(self, micros: list[Microbatch]) -> np.ndarray | None:
        """Compute this rank's microbatches, and do the sum; None if a rank was lost, and all is to be done anew."""
        seed = self.seed
        for micro in micros[:-1]:
            self._compute(micro, [micro[name] for name in self.data.names], seed, last=False)
        if micros:
            micro = micros[-1]
            logs = self._compute(micro, [micro[name] for name in self.data.names], seed, last=True)
        else:  # a rank without samples computes an example, which does not count, since its graph does the update
            logs = self._compute(None, self.data.example, seed, last=True)
        return logs.numpy() if self._whole else None

    def _compute(self, micro: Microbatch | None, arrays: list[Any], seed: int, *, last: bool) -> Any:
        assert self._step is not None
        self._micro, self._last, self._whole = micro, last, False
        words = self._no_words
        refused.check_like(arrays, self.data)
        if micro is not None and self._seeds:
            words = tf.constant(seed_words(seed, self._step.number, micro.index), tf.int32)
        _, logs = self._call(words, *(tf.constant(array) for array in arrays), *self._captures)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return logs

    def _meet(self, *given: np.ndarray) -> list[Any]:
        """Contribute a microbatch; if it is the last one, do the sum. Called from the graph, which no error may leave."""
        step, means, count = self._step, len(self._means.dtypes), len(given) - len(self._watched)
        arrays = given[:count]
        assert step is not None
        try:
            if self._micro is not None:
                step.take(self._micro)
                step.add(list(arrays[:means]), sums=[*arrays[means:], self._word(given[count:])])
            if self._last and step.exchange():
                values, (*sums, self._words) = step.reduce()
                self._whole = True
                step.metrics |= self._loss_in(sums)
                # Into the graph's own memory: what ranks share must not be where TensorFlow may compute in place.
                for array, total in zip(arrays, (*values, *sums), strict=True):
                    np.copyto(array, total)
                return [True, *arrays, np.float32(self._factor(step, values))]
        except BaseException as error:  # noqa: BLE001  (raised once the graph has ended)
            self._failure = error
        return [False, *(np.empty(0, array.dtype) for array in arrays), np.float32(1)]

    def _factor(self, step: Step, values: list[np.ndarray]) -> float:
        """Return by what the learning rate is multiplied in this step."""
        scale = max(1.0, step.size / self.data.batch)
        if self.adascale is None:
            return rules.factor(self.rule, scale)
        gradients = values[0][: self._gradients]
        # Not a dot product of BLAS's, whose order may depend on where the numbers lie: all ranks have to find the same.
        square = float(np.square(gradients, dtype=np.float64).sum())
        parts = min(step.size, self.leaves)
        found = rules.moments(float(values[0][self._gradients]), square, parts, step.size / parts, self.data.batch)
        # An optimizer that scales the loss doubles and halves that scale, and the memory is of the gradients without it.
        variance, true = (moment / self._loss_scale**2 for moment in found)
        return self.adascale.factor(variance, true, scale)

    def _loss_in(self, sums: list[np.ndarray]) -> dict[str, float]:
        if self._loss is None:
            return {}
        total, count = (float(sums[which][place]) for which, place in self._loss_places)
        return {"loss": total / count} if count else {}

    # --- the graph ----------------------------------------------------------------------------------------------------

    def _microbatch(self, words: tf.Tensor, *flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        metrics, watching = self._metrics, [read(variable) for variable in self._watched]
        before = [read(variable) for variable in metrics]
        for variable in metrics:
            variable.assign(tf.zeros_like(variable.value))
        others = [variable for variable in self.model.non_trainable_variables if variable.name != SEEDS]
        others_before = [read(variable) for variable in others]
        seeds_before = mix(self._seeds, words)

        with collecting(self.optimizer) as taken:
            logs = self.model.train_step(self.data.packed(flat))
        gradients, variables = only(taken, self.model)
        there = [number for number, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.convert_to_tensor(gradients[number]) for number in there]

        moving = changed(others)
        state = [variable for variable, each in zip(others, moving, strict=True) if each]
        state_before = [value for value, each in zip(others_before, moving, strict=True) if each]
        moved = [read(variable) for variable in state]
        is_mean = [value.dtype.is_floating for value in moved]
        additions = [read(variable) for variable in metrics]
        for variable, value in zip(metrics, before, strict=True):
            variable.assign(value)
        for variable, value in zip([*state, *self._seeds], [*state_before, *seeds_before], strict=True):
            variable.assign(value)

        own = self._own_logs(logs)
        counted = [a - b for a, b, mean in zip(moved, state_before, is_mean, strict=True) if not mean]
        if self.adascale is not None and len({one.dtype for one in dense}) > 1:
            raise ConfigError('rule="adascale" needs weights of one dtype: use "linear" or "sqrt"')
        squares = [tf.add_n([tf.reduce_sum(tf.square(one)) for one in dense])] if self.adascale is not None else []
        self._gradients = sum(int(np.prod(one.shape)) for one in dense)
        means = [*dense, *squares, *(value for value, mean in zip(moved, is_mean, strict=True) if mean), *own.values()]
        sums = [*additions, *counted]
        self._means, self._sums = Flat(means), Flat(sums)
        self._loss_places = self._places(sums)
        packed = [*self._means.pack(means), *self._sums.pack(sums)]
        dtypes = [tf.bool, *(tensor.dtype for tensor in packed), tf.float32]
        whole, *results, factor = tf.numpy_function(self._meet, [*packed, *watching], dtypes)
        whole.set_shape([])
        factor.set_shape([])

        def update() -> tf.Tensor:
            values = iter(self._means.unpack(results[: len(self._means.dtypes)]))
            totals = iter(self._sums.unpack(results[len(self._means.dtypes) :]))
            mean = list(gradients)
            for number in there:
                mean[number] = next(values)
            for _ in squares:
                next(values)
            with self._rate_times(factor):
                self.optimizer.apply(mean, variables)
            for variable, value in zip(metrics, before, strict=True):
                variable.assign(value + next(totals))
            for variable, value, is_a_mean in zip(state, state_before, is_mean, strict=True):
                variable.assign(next(values) if is_a_mean else value + next(totals))
            found = {**self._of_metrics(logs), **dict(zip(own, values, strict=True))}
            flat = [refused.fixed(name, value) for name, value in found.items()]
            self._forms = [(name, tuple(value.shape)) for name, value in zip(found, flat, strict=True)]
            return tf.concat([tf.reshape(value, [-1]) for value in flat], 0) if flat else tf.zeros([0])

        return whole, tf.cond(whole, update, lambda: tf.zeros([0]))

    @contextlib.contextmanager
    def _rate_times(self, factor: tf.Tensor) -> Iterator[None]:
        """Have another learning rate meanwhile, as the rule has it."""
        if self.rule == rules.FIXED:
            yield
            return
        rate = self.optimizer.learning_rate
        before = read(rate)
        rate.assign(before * tf.cast(factor, before.dtype))
        yield
        rate.assign(before)

    def _own_logs(self, logs: dict[str, Any]) -> dict[str, tf.Tensor]:
        """Return those of a step's logs that are no metric of the model's: their means are taken."""
        known = self.model.get_metrics_result()
        return {name: refused.fixed(name, value) for name, value in logs.items() if name not in known}

    def _of_metrics(self, logs: dict[str, Any]) -> dict[str, tf.Tensor]:
        return {name: value for name, value in self.model.get_metrics_result().items() if name in logs}

    def _places(self, sums: list[tf.Tensor]) -> list[tuple[int, int]]:
        """Return where the sum and the count of the loss lie in the flat sums."""
        if self._loss is None:
            return []
        found = []
        for number in self._loss:
            dtype = sums[number].dtype
            before = sum(int(np.prod(t.shape)) for t in sums[:number] if t.dtype == dtype)
            found.append((self._sums.dtypes.index(dtype), before))
        return found

    def _refuse_strangers(self) -> None:
        known = [*self.model.variables, *self._metrics, *self.optimizer.variables]
        ours = {id(variable.value) for variable in known}
        strangers = [variable.name for variable in self._graph.graph.variables if id(variable) not in ours]
        if strangers:
            raise ConfigError(
                f"train_step uses {', '.join(strangers)}, of neither the model, its metrics nor its optimizer, which "
                "newcomers would not have: make layers, seed generators and metrics attributes of the model"
            )
