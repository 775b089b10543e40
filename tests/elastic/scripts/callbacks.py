"""Callbacks that do otherwise on each rank, read the logs of each batch, or stop; and fits of a model that is compiled anew.

Usage: python callbacks.py WHAT STEP
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

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
    if what == "sleep":
        sleep(job, model, samples, test)
        return
    if what == "fits":
        fits(job, model, elastic, samples, test)
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


def sleep(job, model, samples, test):
    """Fit on ranks that sleep meanwhile, with callbacks that remember, and say what came of it."""
    rest = [keras.callbacks.EarlyStopping("val_loss", patience=9), keras.callbacks.ReduceLROnPlateau("val_loss", patience=9)]
    once = he.keras.OnLeader(job, keras.callbacks.CSVLogger("log.csv"))
    elastic = he.keras.Elasticity(job, keep=rest)
    fit = model.fit(samples, epochs=EPOCHS, validation_data=test, callbacks=[elastic, *rest, once], verbose=2)
    found = model.evaluate(test, callbacks=[elastic], verbose=0)
    say(f"slept {fit.epoch} {fit.history} {rest[0].best} {found} {he.keras.weights_sha256(model.get_weights())}")


def fits(job, model, elastic, samples, test):
    """Fit, fit another model, and fit the first one again, and say what each of them is known to have made."""
    early = keras.callbacks.EarlyStopping("val_loss", patience=9)
    elastic = he.keras.Elasticity(job, keep=[early])
    first = model.fit(samples, epochs=1, validation_data=test, callbacks=[elastic, early], verbose=0)
    at_once = first.history["val_loss"][-1]  # a newcomer of the second one has not joined yet
    other, both = build(), he.keras.Elasticity(job)
    second = other.fit(samples, epochs=2, validation_data=test, callbacks=[both, Killed(job)], verbose=0)
    third = model.fit(samples, epochs=2, callbacks=[elastic, early], verbose=0)
    said = [at_once, *((fit.epoch, fit.history) for fit in (first, second, third)), early.best]
    assert other.history is second
    say(f"fits {said} {he.keras.weights_sha256(model.get_weights())}")


class Killed(keras.callbacks.Callback):
    """Kills the only rank at the step that is asked for, once."""

    def __init__(self, job):
        super().__init__()
        self.job, self.step = job, int(sys.argv[2])

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002  (Keras's signature)
        if self.job.size == 1 and int(self.model.optimizer.iterations) == self.step and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    he.run(train)
