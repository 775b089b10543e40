"""Callbacks that do otherwise on each rank, read the logs of each batch, or stop; and fits of a model that is compiled anew.

Usage: python callbacks.py WHAT
"""

from __future__ import annotations

import os
import sys

import numpy as np

import hpc_elastic as he

he.keras.same_bits(threads=1, seed=1)

import keras  # noqa: E402  (after the settings that it reads when it starts)

SAMPLES, BATCH, EPOCHS = 120, 20, 4
rng = np.random.default_rng(0)
x = rng.normal(size=(SAMPLES, 5)).astype(np.float32)
y = (x.sum(1) > 0).astype(np.int64)


class Own(keras.callbacks.Callback):
    """What each rank decides by itself."""

    def __init__(self, job, what):
        super().__init__()
        self.job, self.what, self.passed = job, what, 0

    def on_train_batch_end(self, batch, logs=None):
        assert logs["loss"] > 0, logs  # there also for batches that were done before this rank came
        step = int(self.model.optimizer.iterations)
        if self.what == "batch" and self.job.size > 1 and batch == 1 and step > 10:
            self.model.stop_training = self.job.leads
        if self.what == "rate" and step == 16 and not self.job.leads:
            self.model.optimizer.learning_rate = 0.5

    def on_epoch_end(self, epoch, logs=None):
        assert logs["val_loss"] > 0, logs
        if self.what in ("epoch", "other"):
            self.model.stop_training = epoch == 2 and self.job.leads == (self.what == "epoch")
        if self.what == "weights" and epoch == 2 and not self.job.leads:
            self.model.set_weights([2 * weight for weight in self.model.get_weights()])


def say(text):
    """Print a line as one piece, since all ranks do."""
    os.write(1, f"{text}\n".encode())


def build():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    compile_(model)
    return model


def compile_(model, loss=None, metrics=("accuracy",)):
    model.compile("sgd", loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=list(metrics))


def train(job):
    what = sys.argv[1]
    model, elastic = build(), he.keras.Elasticity(job)
    samples, test = he.keras.data({"x": x, "label": y}, batch=BATCH), he.keras.data({"x": x[:50], "label": y[:50]})
    if what == "logger":
        best = keras.callbacks.ModelCheckpoint("best.weights.h5", "loss", save_best_only=True, save_weights_only=True)
        once = [he.keras.OnLeader(job, each) for each in (keras.callbacks.CSVLogger("log.csv"), best)]
        elastic = he.keras.Elasticity(job, keep=once)
        model.fit(samples, epochs=EPOCHS, callbacks=[elastic, *once], verbose=0)
        say(f"rank{job.rank} best {best.best}")
        return
    if what == "again":
        again(model, elastic, samples, test)
        return
    try:
        history = model.fit(
            samples, epochs=EPOCHS, validation_data=test, callbacks=[elastic, Own(job, what)], verbose=0
        ).history
    except he.ConfigError as error:
        say(f"rank{job.rank} raises {error}")
        raise
    found = model.evaluate(test, callbacks=[elastic], return_dict=True, verbose=0)
    say(f"rank{job.rank} epochs {len(history['loss'])} steps {int(model.optimizer.iterations)}")
    assert found["loss"] > 0
    assert "on_epoch_end" not in vars(model.history)


def again(model, elastic, samples, test):
    """Fit, and once more, compiled anew with a layer frozen; evaluate what Keras is given, not what it was given before."""
    first = model.fit(samples, epochs=1, validation_data=test, callbacks=[elastic], verbose=0).history
    frozen = model.layers[0]
    frozen.trainable = False
    before = frozen.get_weights()[0]
    compile_(model, lambda true, found: 100 * keras.losses.sparse_categorical_crossentropy(true, found, True), ["accuracy"])
    second = model.fit(samples, epochs=1, validation_data=test, callbacks=[elastic], verbose=0).history
    assert np.array_equal(before, frozen.get_weights()[0])
    for name in ("loss", "val_loss"):
        assert second[name][0] > 5 * first[name][0], (name, first, second)
    assert second["val_accuracy"][0] > 0, second

    model.predict(test, verbose=0)
    found = model.evaluate(x[50:], y[50:], callbacks=[elastic], return_dict=True, verbose=0)
    alone = model.evaluate(x[50:], y[50:], return_dict=True, verbose=0)
    assert found == alone, (found, alone)
    model.evaluate(test, verbose=0)
    predicted = model.predict(x[50:], callbacks=[elastic], verbose=0)
    assert len(predicted) == SAMPLES - 50


if __name__ == "__main__":
    he.run(train)
