"""What can't be done in a job, told before it would give bits that depend on the ranks: models, steps, samples and logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from ..errors import ConfigError
from . import rules
from .tracing import collecting, read, written

if TYPE_CHECKING:
    from .dataset import Data

MEANS = ("sum_over_batch_size", "mean")  # reductions of losses: a batch's is the mean of the microbatches'
FAR = 1000.0  # a value that metrics of the example don't come near


def refuse(model: Any, rule: str, leaves: int) -> None:
    """Raise `ConfigError` for what can't be done with `model` in a job."""
    if not model.compiled or model.optimizer is None:
        raise ConfigError("he.keras.Elasticity needs a compiled model with an optimizer")
    if rule == rules.ADASCALE and leaves < 2:  # noqa: PLR2004  (of one the variance is not known)
        raise ConfigError('rule="adascale" compares the gradients of microbatches: set microbatches to 2 or more')
    if rule != rules.FIXED and not hasattr(model.optimizer.learning_rate, "assign"):
        raise ConfigError(
            f"rule={rule!r} multiplies the learning rate, which is a schedule: give the optimizer a number, and change it "
            "by the callback LearningRateScheduler"
        )
    if model.run_eagerly:
        raise ConfigError(
            "compile(run_eagerly=True) can't be elastic: a step is traced once, into graphs, and the sum is between them"
        )
    if tf.distribute.has_strategy() or model._distribute_strategy is not None:  # noqa: SLF001
        raise ConfigError("tf.distribute would sum gradients as well: build the model without a strategy")
    odd = [variable.path for variable in model.metrics_variables if variable.aggregation != "sum"]
    if odd:
        raise ConfigError(f"the metric variable {odd[0]} is no sum (its aggregation), so that of microbatches is not known")


def refuse_frozen(model: Any) -> None:
    """Raise `ConfigError` if a built model has nothing to train, of which Keras would only warn."""
    if not model.trainable_variables:
        raise ConfigError(
            "the model has no weights to be trained: evaluate it, or make layers trainable and compile it again"
        )


def refuse_losses(model: Any) -> None:
    """Raise `ConfigError` for losses of which that of a batch is not the mean of those of its microbatches."""
    for one in getattr(model._compile_loss, "_flat_losses", None) or ():  # noqa: SLF001  (resolved nowhere else)
        if one.loss.reduction not in MEANS:
            raise ConfigError(
                f"the loss {one.loss.name} has reduction={one.loss.reduction!r}, and that of a batch is not the mean of its "
                'microbatches\': use reduction="sum_over_batch_size", and another learning rate'
            )


def refuse_draws(graph: Any, step: str) -> None:
    """Raise `ConfigError` if random numbers are drawn in `graph`, or inside its loops, whose state is TensorFlow's own."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    for node in nodes:
        if {"seed", "seed2"} <= node.attr.keys() and not node.op.startswith("CudnnRNN"):  # whose dropout Keras leaves at 0
            raise ConfigError(
                f"{step} draws random numbers by TensorFlow's {node.op} ({node.name}), which go on by a rank's own count: "
                "draw by keras.random with a keras.random.SeedGenerator that is an attribute of the model, or by "
                "tf.random.stateless_… with its next()"
            )


def refuse_strangers(graph: Any, known: list[Any], step: str, *, may_read: bool) -> None:
    """Raise `ConfigError` if `graph` uses variables that are not `known`; or, where it `may_read` those, changes them."""
    ours, touched = {id(variable.value.handle) for variable in known}, written(graph)
    named = {id(variable.handle): variable.name for variable in graph.variables}
    for outside, inside in graph.captures:
        strange = inside.name in touched if may_read else id(outside) in named
        if strange and id(outside) not in ours:
            raise ConfigError(
                f"{step} {'changes' if may_read else 'uses'} {named.get(id(outside), inside.name)}, which is not the "
                "model's, so its value would depend on the ranks: make layers, seed generators and metrics attributes of "
                "the model"
            )


def check_like(arrays: Sequence[Any], data: Data) -> None:
    """Raise `ConfigError` if samples are of another shape or dtype than those that the step was traced for."""
    for name, array, example in zip(data.names, map(np.asarray, arrays), data.example, strict=True):
        if array.shape[1:] != example.shape[1:] or array.dtype != example.dtype:
            raise ConfigError(
                f"field {name!r} has samples of {array.dtype} {list(array.shape[1:])}, and those at the beginning were of "
                f"{example.dtype} {list(example.shape[1:])}: let decode make all of them alike"
            )


def fixed(name: str, value: Any) -> tf.Tensor:
    """Return one of a step's logs in float32; its shape has to be the same for all microbatches."""
    value = tf.cast(value, tf.float32)
    if not value.shape.is_fully_defined():
        raise ConfigError(
            f"train_step returns {name!r} of shape {value.shape}, which is not the same in each step: its mean?"
        )
    return value


def refuse_metrics(model: Any, data: Data) -> None:
    """Raise `ConfigError` for metrics that don't add to their variables: from zero and from far away, the example is tried.

    Keras's own are known to add. Called with a model whose metrics are built; everything is as before afterwards.
    """
    leaves = [one for metric in model.metrics for one in getattr(metric, "metrics", None) or [metric]]
    if all(type(one).__module__.partition(".")[0] == "keras" for one in leaves):
        return
    metrics = model.metrics_variables
    kept = [(variable, np.asarray(variable).copy()) for variable in [*model.variables, *metrics]]

    def added(start: tf.Tensor, *flat: tf.Tensor) -> list[tf.Tensor]:
        starts = [tf.fill(variable.shape, tf.cast(start, read(variable).dtype)) for variable in metrics]
        for variable, value in zip(metrics, starts, strict=True):
            variable.assign(value)
        with collecting(model.optimizer):
            model.train_step(data.packed(flat))
        return [read(variable) - value for variable, value in zip(metrics, starts, strict=True)]

    step = tf.function(added, autograph=False)
    found = []
    for start in (0.0, FAR):
        found.append([np.asarray(one) for one in step(tf.constant(start), *map(tf.convert_to_tensor, data.example))])
        for variable, value in kept:
            variable.assign(value)
    for variable, near, far in zip(metrics, *found, strict=True):
        precision = 8 * FAR * np.finfo(near.dtype).eps if near.dtype.kind == "f" else 0
        if not np.allclose(near, far, rtol=1e-3, atol=precision, equal_nan=True):
            raise ConfigError(
                f"the metric variable {variable.path} is no sum, so that of microbatches can't be put together: let "
                "update_state add to it, and result make the rest of it"
            )
