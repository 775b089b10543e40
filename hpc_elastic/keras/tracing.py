"""What it takes to trace a user's `train_step`: gradients taken in, changes read off the graph, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

import keras

from ..errors import ConfigError
from . import rules

MASK = (1 << 64) - 1


def seed_words(seed: int, step: int, microbatch: int) -> tuple[int, int]:
    """Return two numbers of 32 bits for the seeds of a microbatch (SplitMix64 of Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = seed
    for number in (step, microbatch):
        mixed = (mixed + number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        mixed ^= mixed >> 31
    return (mixed >> 33, mixed & 0x7FFFFFFF)


def read(variable: Any) -> tf.Tensor:
    """Return the value that a variable has at this place of the graph."""
    return tf.identity(variable.value)


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


def only(taken: list[tuple[list[Any], list[Any]]], weights: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the gradients and variables that were taken in, once, by a step that leaves the `weights` to the optimizer."""
    if len(taken) != 1:
        raise ConfigError(
            f"train_step applied its compiled optimizer {len(taken)} times, and has to do so once: there is one sum over "
            "the ranks in a step. Use a loop of your own, with job.steps"
        )
    if any(changed(weights, inside=False)):
        raise ConfigError(
            "train_step changes weights itself, which would come before the sum over the ranks: let a constraint of the "
            "layer's do it, or a callback"
        )
    return taken[0]


def changed(variables: list[Any], *, inside: bool = True) -> list[bool]:
    """Tell of which variables the graph so far changes the value; with `inside`, or may do so inside loops and the like."""
    graph = tf.compat.v1.get_default_graph()
    touched = set()
    for operation in graph.get_operations():
        if operation.type.startswith("Assign"):
            touched.add(operation.inputs[0].name)
        elif inside and any(attribute.type == "func" for attribute in operation.op_def.attr):
            touched |= {tensor.name for tensor in operation.inputs if tensor.dtype == tf.resource}
    return [graph.capture(variable.value.handle).name in touched for variable in variables]


def loss_of(model: Any, variables: list[Any]) -> list[int] | None:
    """Return which two of the metrics' variables are the sum and the count of the loss."""
    for metric in model.metrics:
        if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
            return [next(i for i, other in enumerate(variables) if other is one) for one in (metric.total, metric.count)]
    return None


def refuse(model: Any, rule: str) -> None:
    """Raise `ConfigError` for what can't be done with `model` in a job."""
    if not model.compiled or model.optimizer is None:
        raise ConfigError("he.keras.Elasticity needs a compiled model with an optimizer")
    if rule != rules.FIXED and not hasattr(model.optimizer.learning_rate, "assign"):
        raise ConfigError(
            f"rule={rule!r} multiplies the learning rate, which is a schedule: give the optimizer a number, and change it "
            "by the callback LearningRateScheduler"
        )
    if model.run_eagerly:
        raise ConfigError("compile(run_eagerly=True) can't be elastic: the sum is done inside the graph of a step")
    if tf.distribute.has_strategy() or model._distribute_strategy is not None:  # noqa: SLF001
        raise ConfigError("tf.distribute would sum gradients as well: build the model without a strategy")
    odd = [variable.path for variable in model.metrics_variables if variable.aggregation != "sum"]
    if odd:
        raise ConfigError(f"the metric variable {odd[0]} is no sum (its aggregation), so that of microbatches is not known")
