"""Evaluation and prediction by all ranks: a set in parts, of which each is computed the same way wherever it is.

There are as many parts as microbatches in a step, and a rank has an interval of them. Metrics begin from zero in each, and
are summed along the tree of the canonical sum. Seeds are worked out from (seed, part, chunk), and what a step changes beside
metrics is as before when it ends, so that nothing depends on which parts a rank has had.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

import keras

from ..arrays.host import Array
from ..reduce import Sum
from ..runtime.batches import Batches, Share
from ..sampler import Order, microbatches, without_samples
from . import refused, tracing
from .values import lent

if TYPE_CHECKING:
    from ..runtime.job import Job
    from .dataset import Data


class Chunk(NamedTuple):
    """Samples of a part: the part's number, how many they are, and what the graph is called with."""

    part: int
    size: int
    tensors: list[tf.Tensor]


class Evaluation:
    """Evaluates and predicts with one model.

    Parameters
    ----------
    job : Job
        The ranks. In one that has not joined yet, everything is computed here.
    model : keras.Model
        A model, compiled unless it only predicts.
    """

    def __init__(self, job: Job, model: Any) -> None:
        self._job, self.model = job, model
        self._graphs: dict[tuple[str, str], tracing.Graph] = {}
        self._leaves = job.session.config.microbatches

    def evaluate(self, data: Data) -> dict[str, float]:
        """Return the logs of the whole set, and leave the model's metrics as they are for it. Collective."""
        call = self._graph("test_step", data)
        variables = self.model.metrics_variables
        others = [name for name in call.structure if name not in self.model.get_metrics_result()]
        parts: list[tuple[int, list[Array]]] = []

        def compute() -> None:
            parts[:] = []
            for index, chunks in itertools.groupby(self._own(data), lambda chunk: chunk.part):
                for variable in variables:
                    variable.assign(tf.zeros_like(variable.value))
                means = [np.zeros(())] * len(others)
                for _, n, tensors in chunks:
                    logs = tf.nest.pack_sequence_as(call.structure, call(*tensors))
                    means = [mean + n * np.asarray(logs[name], float) for mean, name in zip(means, others, strict=True)]
                parts.append((index, [*(np.asarray(variable).copy() for variable in variables), *map(np.asarray, means)]))

        def exchange() -> None:
            total.drop()
            for index, values in parts:
                total.add(index, [], {}, 1.0, values)
            total.exchange(without_samples(len(data.samples), self._leaves))

        if self._job.joined:
            total = Sum(self._leaves, self._job.membership.joined)
            self._together(compute, exchange)
            found = total.result()[0][1]
        else:
            compute()
            found = [sum(column) for column in zip(*(values for _, values in parts), strict=True)]
        for variable, value in zip(variables, found[: len(variables)], strict=True):
            variable.assign(value)
        logs = self.model.get_metrics_result()
        for name, total_of in zip(others, found[len(variables) :], strict=True):
            mean = np.asarray(total_of) / len(data.samples)
            logs[name] = mean if mean.ndim else float(mean)
        return {name: logs[name] for name in call.structure}

    def predict(self, data: Data) -> Any:
        """Return what the model makes of the whole set, in its order, as tensors, on every rank. Collective."""
        call = self._graph("predict_step", data)
        parts: list[list[Array]] = []

        def compute() -> None:
            parts[:] = [[np.asarray(one) for one in call(*chunk.tensors)] for chunk in self._own(data)]

        outputs: list[Array] = []

        def gather() -> None:
            own = [np.concatenate(column) for column in zip(*parts, strict=True)]
            count = len(tf.nest.flatten(call.structure))
            everybody = [self._job.collective.allgather(own[i] if own else np.empty(0)) for i in range(count)]
            outputs[:] = [np.concatenate([part for part in column if len(part)]) for column in everybody]

        if self._job.joined:
            self._together(compute, gather)
        else:
            compute()
            outputs = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return tf.nest.pack_sequence_as(call.structure, [tf.convert_to_tensor(one) for one in outputs])

    def _together(self, compute: Callable[[], None], exchange: Callable[[], None]) -> None:
        """Compute this rank's parts, and exchange; once more with a larger share if a rank was lost."""
        membership = self._job.membership
        membership.pass_by()
        compute()
        while not membership.summed(self._job.here, exchange):
            compute()

    def _interval(self) -> tuple[int, int]:
        """Return which parts are this rank's."""
        return Sum(self._leaves, self._job.membership.joined).interval if self._job.joined else (0, self._leaves)

    def _own(self, data: Data) -> Iterator[Chunk]:
        """Yield the samples of this rank's parts, in chunks."""
        seed = self._job.session.config.seed if data.seed is None else data.seed
        low, high = self._interval()
        parts = list(enumerate(microbatches(len(data.samples), self._leaves)))[low:high]
        cuts = [
            (part, number, first, min(stop, first + data.batch) - first)
            for part, (start, stop) in parts
            for number, first in enumerate(range(start, stop, data.batch))
        ]
        shares = [Share(0, 0, first, ((part, 0, size),)) for part, _, first, size in cuts]
        order = Order(len(data.samples), data.seed or 0, shuffle=False)
        with contextlib.closing(Batches(data.samples, order, data.decode)) as batches:
            for (part, number, _, size), share, following in itertools.zip_longest(cuts, shares, shares[1:]):
                (micro,) = batches.take(share)
                if following is not None and batches.slow:
                    batches.begin(following)
                arrays = [np.asarray(micro[name]) for name in data.names]
                refused.check_like(arrays, data)
                words = tf.constant(tracing.seed_words(seed, part, number), tf.int32)
                yield Chunk(part, size, [words, *map(lent, arrays)])

    def _graph(self, step: str, data: Data) -> tracing.Graph:
        """Return the model's `step` as a graph, traced for samples like those of `data`."""
        key = step, repr([(array.shape[1:], array.dtype) for array in data.example]) + repr(data.structure)
        if key not in self._graphs:
            specs = [tf.TensorSpec((None, *array.shape[1:]), array.dtype) for array in data.example]
            if self.model.compiled:
                self.model._symbolic_build(data_batch=data.packed(data.example))  # noqa: SLF001  (builds metrics, too)
            elif not self.model.built:
                self.model(keras.utils.unpack_x_y_sample_weight(data.packed(data.example))[0])
            state = self.model.non_trainable_variables

            def chunk(words: tf.Tensor, *flat: tf.Tensor) -> Any:
                before = [tracing.read(variable) for variable in state]
                tracing.mix(tracing.seeds_of(self.model), words)
                found = getattr(self.model, step)(data.packed(flat))
                for variable, value, each in zip(state, before, tracing.changed(state), strict=True):
                    if each:
                        variable.assign(value)
                return found

            call = tracing.Graph(chunk, tf.TensorSpec([2], tf.int32), *specs)
            refused.refuse_draws(call.graph, step)
            known = [*self.model.variables, *self.model.metrics_variables]
            refused.refuse_strangers(call.graph, known, step, may_read=True)
            self._graphs[key] = call
        return self._graphs[key]
