"""One microbatch of a model's `train_step` as a graph; behind a rank's last one, the sum and the update.

The `train_step` runs as it is, but the optimizer's `apply` takes the gradients in. What else it changes, statistics of batch
normalisation, metrics and seeds, is as before when the graph ends, until the sum over all microbatches is there. So every
microbatch starts from the state of the step, whoever computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

import keras

from ..errors import ConfigError
from .flat import Flat

if TYPE_CHECKING:
    from ..runtime.batches import Microbatch
    from ..runtime.step import Step
    from .dataset import Data

SEEDS = "seed_generator_state"  # name of the variable of each of Keras's seed generators
MASK = (1 << 64) - 1


class Traced:
    """The steps of `fit` for one model.

    Parameters
    ----------
    model : keras.Model
        A compiled model; built here if it is not.
    data : Data
        What it is trained on.

    Raises
    ------
    ConfigError
        If its `train_step` can't be cut into microbatches, and why.
    """

    def __init__(self, model: Any, data: Data) -> None:
        self.model, self.data = model, data
        self.optimizer = model.optimizer
        _refuse(model)
        model._symbolic_build(data_batch=data.packed(data.example))  # noqa: SLF001  (no public way builds metrics, too)
        self._seeds = [variable for variable in model.non_trainable_variables if variable.name == SEEDS]
        self._metrics = model.metrics_variables
        self._step: Step | None = None
        self._micro: Microbatch | None = None
        self._last = False
        self._failure: BaseException | None = None
        self._names: list[str] = []
        self._loss = _loss_of(model, self._metrics)
        specs = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in data.example]
        graph = tf.function(self._microbatch, autograph=False)
        self._call = graph.get_concrete_function(tf.TensorSpec([2], tf.int32), *specs)
        self._refuse_strangers()

    # --- a step -------------------------------------------------------------------------------------------------------

    def run(self, step: Step) -> dict[str, float]:
        """Do a step, and return the values of its logs. Collective."""
        self._step, done = step, None
        while done is None:
            done = self._attempt(step.begin())
        return dict(zip(self._names, done, strict=True))

    def _attempt(self, micros: list[Microbatch]) -> list[float] | None:
        """Compute this rank's microbatches, and do the sum; None if a rank was lost, and all is to be done anew."""
        seed = self.data.seed or 0
        for micro in micros[:-1]:
            self._compute(micro, [micro[name] for name in self.data.names], seed, last=False)
        if micros:
            micro = micros[-1]
            whole, logs = self._compute(micro, [micro[name] for name in self.data.names], seed, last=True)
        else:  # a rank without samples computes an example, which does not count, since its graph does the update
            whole, logs = self._compute(None, self.data.example, seed, last=True)
        return logs.numpy().tolist() if bool(whole) else None

    def _compute(self, micro: Microbatch | None, arrays: list[Any], seed: int, *, last: bool) -> Any:
        assert self._step is not None
        self._micro, self._last = micro, last
        words = seed_words(seed, self._step.number, micro.index) if micro is not None and self._seeds else (0, 0)
        found = self._call(tf.constant(words, tf.int32), *(tf.convert_to_tensor(array) for array in arrays))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        return found

    def _meet(self, *arrays: np.ndarray) -> list[Any]:
        """Contribute a microbatch; if it is the last one, do the sum. Called from the graph, which no error may leave."""
        step, means = self._step, len(self._means.dtypes)
        assert step is not None
        try:
            if self._micro is not None:
                step.take(self._micro)
                step.add(list(arrays[:means]), sums=list(arrays[means:]))
            if self._last and step.exchange():
                values, sums = step.reduce()
                step.metrics |= self._loss_in(sums)
                return [True, *values, *sums]
        except BaseException as error:  # noqa: BLE001  (raised once the graph has ended)
            self._failure = error
        return [False, *(np.empty(0, array.dtype) for array in arrays)]

    def _loss_in(self, sums: list[np.ndarray]) -> dict[str, float]:
        if self._loss is None:
            return {}
        total, count = (float(sums[which][place]) for which, place in self._loss_places)
        return {"loss": total / count} if count else {}

    # --- the graph ----------------------------------------------------------------------------------------------------

    def _microbatch(self, words: tf.Tensor, *flat: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        metrics = self._metrics
        before = [_read(variable) for variable in metrics]
        for variable in metrics:
            variable.assign(tf.zeros_like(variable.value))
        others = [variable for variable in self.model.non_trainable_variables if variable.name != SEEDS]
        others_before = [_read(variable) for variable in others]
        seeds_before = [_read(variable) for variable in self._seeds]
        for variable, value in zip(self._seeds, seeds_before, strict=True):
            variable.assign(tf.bitwise.bitwise_xor(value, tf.cast(words, value.dtype)))

        with _collecting(self.optimizer) as taken:
            logs = self.model.train_step(self.data.packed(flat))
        gradients, variables = _only(taken)
        there = [number for number, gradient in enumerate(gradients) if gradient is not None]
        dense = [tf.convert_to_tensor(gradients[number]) for number in there]

        changed = _changed(others)
        state = [variable for variable, each in zip(others, changed, strict=True) if each]
        state_before = [value for value, each in zip(others_before, changed, strict=True) if each]
        moved = [_read(variable) for variable in state]
        is_mean = [value.dtype.is_floating for value in moved]
        additions = [_read(variable) for variable in metrics]
        for variable, value in zip(metrics, before, strict=True):
            variable.assign(value)
        for variable, value in zip([*state, *self._seeds], [*state_before, *seeds_before], strict=True):
            variable.assign(value)

        own = self._own_logs(logs)
        counted = [a - b for a, b, mean in zip(moved, state_before, is_mean, strict=True) if not mean]
        means = [*dense, *(value for value, mean in zip(moved, is_mean, strict=True) if mean), *own.values()]
        sums = [*additions, *counted]
        self._means, self._sums = Flat(means), Flat(sums)
        self._loss_places = self._places(sums)
        packed = [*self._means.pack(means), *self._sums.pack(sums)]
        whole, *results = tf.numpy_function(self._meet, packed, [tf.bool, *(tensor.dtype for tensor in packed)])
        whole.set_shape([])

        def update() -> tf.Tensor:
            values = iter(self._means.unpack(results[: len(self._means.dtypes)]))
            totals = iter(self._sums.unpack(results[len(self._means.dtypes) :]))
            mean = list(gradients)
            for number in there:
                mean[number] = next(values)
            self.optimizer.apply(mean, variables)
            for variable, value in zip(metrics, before, strict=True):
                variable.assign(value + next(totals))
            for variable, value, is_a_mean in zip(state, state_before, is_mean, strict=True):
                variable.assign(next(values) if is_a_mean else value + next(totals))
            found = {**self._of_metrics(logs), **dict(zip(own, values, strict=True))}
            self._names = list(found)
            return tf.stack([tf.cast(value, tf.float32) for value in found.values()]) if found else tf.zeros([0])

        return whole, tf.cond(whole, update, lambda: tf.zeros([len(logs)]))

    def _own_logs(self, logs: dict[str, Any]) -> dict[str, tf.Tensor]:
        """Return those of a step's logs that are no metric of the model's: their means are taken."""
        known = self.model.get_metrics_result()
        return {name: tf.cast(value, tf.float32) for name, value in logs.items() if name not in known}

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
        strangers = [variable.name for variable in self._call.graph.variables if id(variable) not in ours]
        if strangers:
            raise ConfigError(
                f"train_step uses {', '.join(strangers)}, of neither the model, its metrics nor its optimizer, which "
                "newcomers would not have: make layers, seed generators and metrics attributes of the model"
            )


def seed_words(seed: int, step: int, microbatch: int) -> tuple[int, int]:
    """Return two numbers of 32 bits for the seeds of a microbatch (SplitMix64 of Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = seed
    for number in (step, microbatch):
        mixed = (mixed + number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        mixed ^= mixed >> 31
    return (mixed >> 33, mixed & 0x7FFFFFFF)


def _read(variable: Any) -> tf.Tensor:
    """Return the value that a variable has at this place of the graph."""
    return tf.identity(variable.value)


@contextlib.contextmanager
def _collecting(optimizer: Any) -> Iterator[list[tuple[list[Any], list[Any]]]]:
    """While a step is traced, take in what the optimizer should apply."""
    taken: list[tuple[list[Any], list[Any]]] = []

    def apply(grads: Any, trainable_variables: Any = None) -> None:
        variables = optimizer._trainable_variables if trainable_variables is None else trainable_variables  # noqa: SLF001
        taken.append((list(grads), list(variables)))

    vars(optimizer)["apply"] = apply
    try:
        yield taken
    finally:
        del vars(optimizer)["apply"]


def _only(taken: list[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    if len(taken) != 1:
        raise ConfigError(
            f"train_step applied its compiled optimizer {len(taken)} times, and has to do so once: there is one sum over "
            "the ranks in a step. Use a loop of your own, with job.steps"
        )
    return taken[0]


def _changed(variables: list[Any]) -> list[bool]:
    """Tell of which variables the graph so far may change the value."""
    graph = tf.compat.v1.get_default_graph()
    touched = set()
    for operation in graph.get_operations():
        if operation.type.startswith("Assign"):
            touched.add(operation.inputs[0].name)
        elif any(attribute.type == "func" for attribute in operation.op_def.attr):
            touched |= {tensor.name for tensor in operation.inputs if tensor.dtype == tf.resource}
    return [graph.capture(variable.value.handle).name in touched for variable in variables]


def _loss_of(model: Any, variables: list[Any]) -> list[int] | None:
    """Return which two of the metrics' variables are the sum and the count of the loss."""
    for metric in model.metrics:
        if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
            return [next(i for i, other in enumerate(variables) if other is one) for one in (metric.total, metric.count)]
    return None


def _refuse(model: Any) -> None:
    if not model.compiled or model.optimizer is None:
        raise ConfigError("he.keras.Elasticity needs a compiled model with an optimizer")
    if model.run_eagerly:
        raise ConfigError("compile(run_eagerly=True) can't be elastic: the sum is done inside the graph of a step")
    if tf.distribute.has_strategy() or model._distribute_strategy is not None:  # noqa: SLF001
        raise ConfigError("tf.distribute would sum gradients as well: build the model without a strategy")
    odd = [variable.path for variable in model.metrics_variables if variable.aggregation != "sum"]
    if odd:
        raise ConfigError(f"the metric variable {odd[0]} is no sum (its aggregation), so that of microbatches is not known")
