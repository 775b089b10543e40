"""A step of a model's `train_step` as two graphs: one gives the gradients of a microbatch, the other does the update.

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

from ..arrays.host import held
from ..errors import ConfigError
from . import refused, rules
from .flat import Flat
from .tracing import SEEDS, Graph, changed, collecting, loss_of, mix, only, read, seed_words, seeds_of, watched
from .values import lent, loans

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
        refused.refuse_frozen(model)
        refused.refuse_losses(model)
        refused.refuse_metrics(model, data)
        self._seeds = seeds_of(model)
        self._metrics, self._watched = model.metrics_variables, watched(self.optimizer)
        self._forms: list[tuple[str, tuple[int, ...]]] = []
        self._loss_scale = 1.0
        self._loss = loss_of(model, self._metrics)
        specs = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in data.example]
        self._compute = Graph(self._microbatch, tf.TensorSpec([2], tf.int32), *specs)
        factor = [tf.TensorSpec([], tf.float32)] if rule != rules.FIXED else []
        self._update = Graph(self._apply, *self._means.specs, *self._sums.specs, *factor)
        self._all = [*model.variables, *self._metrics, *self.optimizer.variables]
        for graph in (self._compute.graph, self._update.graph):
            refused.refuse_strangers(graph, self._all, "train_step", may_read=False)
            refused.refuse_draws(graph, "train_step")
        self._no_words = tf.constant((0, 0), tf.int32)

    # --- a step -------------------------------------------------------------------------------------------------------

    def run(self, step: Step, word: Word) -> tuple[dict[str, Any], np.ndarray]:
        """Do a step, and return the values of its logs, and the sum of the words of all microbatches. Collective.

        The values are floats, or arrays of metrics with several numbers. `word` is called with what is `tracing.watched`.
        """
        if self.adascale is not None and hasattr(self.optimizer, "dynamic_scale"):
            self._loss_scale = float(self.optimizer.dynamic_scale)
        while not self._attempt(step, word):
            pass
        values, (*sums, words) = step.reduce()
        step.metrics |= self._loss_in(sums)
        factor = [np.float32(self._factor(step, values))] if self.rule != rules.FIXED else []
        lending = loans((*values, *sums, *factor))
        found = self._named(np.asarray(self._update(*map(lent, lending))[0]))
        if held(lending):
            self._let_go()
        return found, words

    def _named(self, logs: np.ndarray) -> dict[str, Any]:
        """Return the logs by their names; no array is a part of `logs`."""
        found, stop = {}, 0
        for name, shape in self._forms:
            start, stop = stop, stop + math.prod(shape)
            found[name] = logs[start:stop].reshape(shape).copy() if shape else float(logs[start])
        return found

    def _let_go(self) -> None:
        """Have variables keep copies: what is assigned as it is shares the memory of the sum, which is filled again."""
        for variable in self._all:
            variable.assign(np.asarray(variable).copy())

    def _attempt(self, step: Step, word: Word) -> bool:
        """Compute this rank's microbatches, and do the sum; False if a rank was lost, and all is to be done anew."""
        means = len(self._means.dtypes)
        count = means + len(self._sums.dtypes)
        for micro in step.begin():
            arrays = self._computed(step, micro)
            step.take(micro)
            step.add(arrays[:means], sums=[*arrays[means:count], word(arrays[count:])])
        return step.exchange()

    def _computed(self, step: Step, micro: Microbatch) -> list[np.ndarray]:
        """Return what is to be added up of a microbatch, and the values of what is `tracing.watched`."""
        arrays = [micro[name] for name in self.data.names]
        refused.check_like(arrays, self.data)
        words = self._no_words
        if self._seeds:
            words = tf.constant(seed_words(self.seed, step.number, micro.index), tf.int32)
        return [np.asarray(tensor) for tensor in self._compute(words, *map(lent, arrays))]

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

    def _microbatch(self, words: tf.Tensor, *flat: tf.Tensor) -> list[tf.Tensor]:
        metrics, watching = self._metrics, [read(variable) for variable in self._watched]
        before = [read(variable) for variable in metrics]
        for variable in metrics:
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        others = [variable for variable in self.model.non_trainable_variables if variable.name != SEEDS]
        others_before = [read(variable) for variable in others]
        seeds_before = mix(self._seeds, words)

        with collecting(self.optimizer) as taken:
            logs = self.model.train_step(self.data.packed(flat))
        gradients, self._variables = only(taken, self.model)
        self._there = [gradient is not None for gradient in gradients]
        dense = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]

        moving = changed(others)
        self._state = [variable for variable, each in zip(others, moving, strict=True) if each]
        state_before = [value for value, each in zip(others_before, moving, strict=True) if each]
        moved = [read(variable) for variable in self._state]
        self._is_mean = [value.dtype.is_floating for value in moved]
        additions = [read(variable) for variable in metrics]
        to_put_back = [*before, *state_before, *seeds_before]
        for variable, value in zip([*metrics, *self._state, *self._seeds], to_put_back, strict=True):
            variable.assign(value)

        self._logs, own = list(logs), self._own_logs(logs)
        self._own = list(own)
        counted = [a - b for a, b, mean in zip(moved, state_before, self._is_mean, strict=True) if not mean]
        if self.adascale is not None and len({one.dtype for one in dense}) > 1:
            raise ConfigError('rule="adascale" needs weights of one dtype: use "linear" or "sqrt"')
        squares = [tf.add_n([tf.reduce_sum(tf.square(one)) for one in dense])] if self.adascale is not None else []
        self._gradients = sum(int(np.prod(one.shape)) for one in dense)
        means = [*dense, *squares, *(value for value, mean in zip(moved, self._is_mean, strict=True) if mean), *own.values()]
        sums = [*additions, *counted]
        self._means, self._sums = Flat(means), Flat(sums)
        self._loss_places = self._places(sums)
        return [*self._means.pack(means), *self._sums.pack(sums), *watching]

    def _apply(self, *flat: tf.Tensor) -> tf.Tensor:
        """Return the logs of a step, after the update, from the sums over all microbatches, and the rule's factor if any."""
        means, count = len(self._means.dtypes), len(self._means.dtypes) + len(self._sums.dtypes)
        values, totals = iter(self._means.unpack(flat[:means])), iter(self._sums.unpack(flat[means:count]))
        gradients = [next(values) if there else None for there in self._there]
        if self.adascale is not None:
            next(values)  # of the squares
        with self._rate_times(*flat[count:]):
            self.optimizer.apply(gradients, self._variables)
        for variable in self._metrics:
            variable.assign(read(variable) + next(totals))
        for variable, is_a_mean in zip(self._state, self._is_mean, strict=True):
            variable.assign(next(values) if is_a_mean else read(variable) + next(totals))
        of_metrics = {name: value for name, value in self.model.get_metrics_result().items() if name in self._logs}
        found = of_metrics | dict(zip(self._own, values, strict=True))
        logs = [refused.fixed(name, value) for name, value in found.items()]
        self._forms = [(name, tuple(value.shape)) for name, value in zip(found, logs, strict=True)]
        return tf.concat([tf.reshape(value, [-1]) for value in logs], 0) if logs else tf.zeros([0])

    @contextlib.contextmanager
    def _rate_times(self, factor: tf.Tensor | None = None) -> Iterator[None]:
        """Have another learning rate meanwhile, as the rule has it."""
        if factor is None:
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
