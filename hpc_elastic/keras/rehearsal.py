"""What TensorFlow and Keras do only once in a process, done ahead, in a process that waits to be a newcomer.

A tiny model is made, traced and run, in a thread of its own and a context of TensorFlow's of its own, and thrown away with
both: Keras keeps its names, policies and seeds by thread, TensorFlow its seeds and settings by context. Not at a low
priority: a thread that TensorFlow starts meanwhile and keeps (``tf_graph_runner``) would have that for good.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

import keras

from ..arrays.gpu import PRESENT
from ..config import RUN_VARIABLE


def rehearse(threads: int) -> None:
    """Do it once, with so many threads as the job has within an operation: TensorFlow has one pool of these a process.

    Where there may be GPUs nothing is done: TensorFlow would take memory of theirs for one that only waits, and look for
    them before this process has been told which are its own.
    """
    if PRESENT or keras.backend.backend() != "tensorflow":
        return
    if any(device.device_type != "CPU" for device in tf.config.list_physical_devices()):
        context._reset_context()  # noqa: SLF001  (which this has begun)
        return
    problems: list[BaseException] = []

    def act() -> None:
        try:
            _play()
        except BaseException as problem:  # noqa: BLE001  (raised below)
            problems.append(problem)

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    usual, thread = tempfile.tempdir, threading.Thread(target=act)
    run = os.environ.get(RUN_VARIABLE)  # where nobody minds what one that is killed leaves
    with tempfile.TemporaryDirectory(dir=Path(run) / "warm" if run else None) as folder:  # AutoGraph leaves files
        tempfile.tempdir = folder
        thread.start()
        thread.join()
        tempfile.tempdir = usual
    context._reset_context()  # noqa: SLF001  (there is no public one)
    if problems:
        raise problems[0]


def _play() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="relu"), keras.layers.Dense(2)])
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.uint8), tf.TensorSpec((None,), tf.int64)])  # type: ignore[untyped-decorator]
    def gradients(inputs: tf.Tensor, labels: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(tf.cast(inputs, tf.float32) / 255))
        return tape.gradient(loss, model.trainable_variables)  # type: ignore[no-any-return]

    optimizer = keras.optimizers.SGD()
    optimizer.apply(gradients(np.zeros((1, 4), np.uint8), np.zeros(1, np.int64)), model.trainable_variables)
