"""What it takes to trace a user's `train_step`: gradients taken in, seeds mixed, changes read off the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

import keras

from ..errors import ConfigError

MASK = (1 << 64) - 1
SEEDS = "seed_generator_state"  # name of the variable of each of Keras's seed generators
READ = (
    *("ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VariableShape", "VarIsInitializedOp", "DisableCopyOnRead"),
    *("LookupTableFindV2", "LookupTableSizeV2"),
)
READ_INSIDE = "_read_only_resource_inputs"  # inputs that the function which an operation calls only reads


class Graph:
    """A function as a graph, called past the matching of arguments, which costs as much as a small model's gradient.

    Parameters
    ----------
    function : callable
        What is traced.
    *specs : tf.TensorSpec
        What tensors it is called with.

    Attributes
    ----------
    graph : tf.Graph
        The graph.
    structure
        How its results nest, as ``tf.nest`` takes them apart.
    """

    def __init__(self, function: Callable[..., Any], *specs: tf.TensorSpec) -> None:
        self._concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
        self.graph = self._concrete.graph
        self.structure = self._concrete.structured_outputs
        self._call, self._captures = self._concrete.inference_fn.call_flat, self._concrete.captured_inputs

    def __call__(self, *tensors: tf.Tensor) -> Sequence[tf.Tensor]:
        """Return its results, flat."""
        found: Sequence[tf.Tensor] = self._call(*tensors, *self._captures)
        return found


def seed_words(seed: int, step: int, microbatch: int) -> tuple[int, int]:
    """Return two numbers of 32 bits for the seeds of a microbatch (SplitMix64 of Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = seed
    for number in (step, microbatch):
        mixed = (mixed + number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        mixed ^= mixed >> 31
    return (mixed >> 33, mixed & 0x7FFFFFFF)


def watched(optimizer: Any) -> list[Any]:
    """Return the variables of an optimizer that callbacks may change: its rate, unless that is a schedule, and its steps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    rate, steps = inner.learning_rate, inner._iterations  # noqa: SLF001  (with accumulation, `iterations` is no variable)
    return [*([rate] if hasattr(rate, "assign") else []), steps]


def read(variable: Any) -> tf.Tensor:
    """Return the value that a variable has at this place of the graph."""
    return tf.identity(variable.value)


def seeds_of(model: Any) -> list[Any]:
    """Return the variables of the model's seed generators."""
    return [variable for variable in model.non_trainable_variables if variable.name == SEEDS]


def mix(seeds: list[Any], words: tf.Tensor) -> list[tf.Tensor]:
    """Mix `words`, int32 ``[2]``, into the `seeds`, and return what they were."""
    before = [read(variable) for variable in seeds]
    for variable, value in zip(seeds, before, strict=True):
        variable.assign(tf.bitwise.bitwise_xor(value, tf.cast(words, value.dtype)))
    return before


@contextlib.contextmanager
def collecting(optimizer: Any) -> Iterator[list[tuple[list[Any], list[Any]]]]:
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


def only(taken: list[tuple[list[Any], list[Any]]], model: Any) -> tuple[list[Any], list[Any]]:
    """Return the gradients and variables that were taken in, once, by a step that leaves the weights to the optimizer."""
    if len(taken) != 1:
        raise ConfigError(
            f"train_step applied its compiled optimizer {len(taken)} times, and has to do so once: there is one sum over "
            "the ranks in a step. Use a loop of your own, with job.steps"
        )
    weights, variables = model.trainable_variables, model.optimizer.variables
    touched = changed([*weights, *variables])
    if any(touched[: len(weights)]):
        raise ConfigError(
            "train_step changes weights itself, which would come before the sum over the ranks: let a constraint of the "
            "layer's do it, or a callback"
        )
    odd = [variable.path for variable, each in zip(variables, touched[len(weights) :], strict=True) if each]
    if odd:
        raise ConfigError(
            f"train_step changes the optimizer's {odd[0]} itself, which would be done for every microbatch: use a callback"
        )
    return taken[0]


def changed(variables: list[Any]) -> list[bool]:
    """Tell of which variables the graph so far changes the value, or may do so inside loops and the like."""
    graph = tf.compat.v1.get_default_graph()
    touched = written(graph)
    inside = {id(outside): inside.name for outside, inside in graph.captures}  # capturing more would cost at every call
    return [inside.get(id(variable.value.handle)) in touched for variable in variables]


def written(graph: Any) -> set[str]:
    """Return the names of the resources to which something else may be done in `graph` than to read them."""
    found: set[str] = set()
    for operation in graph.get_operations():
        if operation.type in READ:
            continue
        inputs = [(number, tensor) for number, tensor in enumerate(operation.inputs) if tensor.dtype == tf.resource]
        if inputs:
            noted = READ_INSIDE in operation.node_def.attr
            read_inside = operation.get_attr(READ_INSIDE) if noted else ()
            found |= {tensor.name for number, tensor in inputs if number not in read_inside}
    return found


def loss_of(model: Any, variables: list[Any]) -> list[int] | None:
    """Return which two of the metrics' variables are the sum and the count of the loss."""
    for metric in model.metrics:
        if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
            return [next(i for i, other in enumerate(variables) if other is one) for one in (metric.total, metric.count)]
    return None
