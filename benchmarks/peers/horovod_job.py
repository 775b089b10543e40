"""The job with Horovod Elastic on TensorFlow 2, along its documentation: a state that is committed every ten steps.

One thing is better than there: the batch counts as done when it is committed; as documented, each reset would do it again.
The samples are one permutation an epoch, of which each worker takes its share of the next batch.
"""

from __future__ import annotations

import time

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf

from benchmarks.peers.common import BATCH, EVERY, HIDDEN, RATE, SEED, Ledger, Settings

settings = Settings()
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
hvd.init()
images, labels = settings.images("train")
layers = tf.keras.layers
model = tf.keras.Sequential(
    [
        tf.keras.Input((28, 28)),
        layers.Rescaling(1 / 255),
        layers.Flatten(),
        layers.Dense(HIDDEN, activation="relu"),
        layers.Dense(2),
    ]
)
optimizer = tf.keras.optimizers.legacy.Adam(RATE)
loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
stamps, ledger = settings.stamps(), Ledger(settings.folder)


@tf.function
def train_one_batch(data: tf.Tensor, target: tf.Tensor, allreduce: bool = True) -> None:
    """Do one step."""
    with tf.GradientTape() as tape:
        loss = loss_of(target, model(data, training=True))
    if allreduce:
        tape = hvd.DistributedGradientTape(tape)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


@hvd.elastic.run
def train(state: hvd.elastic.TensorFlowKerasState) -> None:
    """Train from where the state is."""
    attempt = hvd.broadcast_object(time.time_ns() // 1000)
    per_epoch = -(-len(images) // BATCH)
    while state.epoch < settings.epochs:
        order = np.random.default_rng((SEED, state.epoch)).permutation(len(images))
        while state.batch < per_epoch:
            own = order[state.batch * BATCH : (state.batch + 1) * BATCH][hvd.rank() :: hvd.size()]
            step = state.epoch * per_epoch + state.batch
            ledger.write(state.epoch, step, attempt, own)
            train_one_batch(tf.constant(images[own]), tf.constant(labels[own]))
            stamps.finished(step, hvd.size())
            settings.pause()
            state.batch += 1
            if state.batch % EVERY == 0:
                state.commit()
        state.epoch, state.batch = state.epoch + 1, 0


train_one_batch(tf.constant(images[:BATCH]), tf.constant(labels[:BATCH]), allreduce=False)
train(hvd.elastic.TensorFlowKerasState(model, optimizer, batch=0, epoch=0))
if hvd.rank() == 0:
    test, expected = settings.images("test")
    settings.result(float(np.mean(np.argmax(model(np.array(test)), axis=1) == expected)))
