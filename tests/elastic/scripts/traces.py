"""A job whose ranks write down what they find before `he.run`: names, random numbers, settings, threads."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import hpc_elastic as he
import keras

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()])  # not once there is a context
early = [
    tf.config.threading.get_intra_op_parallelism_threads(),
    keras.mixed_precision.global_policy().name,
    keras.config.floatx(),
]
he.keras.same_bits(threads=2, seed=3)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2), keras.layers.Dropout(0.5)])
found = [
    *early,
    *(layer.name for layer in model.layers),
    model.name,
    keras.optimizers.SGD().name,
    keras.metrics.Mean().name,
    [variable.path for variable in model.variables],
    [weights.tolist() for weights in model.get_weights()],
    model(np.ones((1, 4), np.float32), training=True).numpy().tolist(),
    random.random(),
    np.random.random(),  # noqa: NPY002  (the state that a script may draw from)
    tf.random.uniform([2]).numpy().tolist(),
    keras.random.uniform([2]).numpy().tolist(),
    tf.Variable(1.0).name,
    tf.compat.v1.get_default_graph().as_graph_def().node,
]


def train(job: he.Job) -> None:
    """Say it, and wait for others to come."""
    Path(f"{job.member.id}.txt").write_text("\n".join(map(str, found)))
    for _ in job.loop(100_000):
        time.sleep(0.005)  # stands for a turn's computation, without which the loop would fill a core


he.run(train)
