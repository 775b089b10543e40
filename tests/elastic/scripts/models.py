"""Keras models of several kinds, each a plain Keras script made elastic by three lines, and the variants of `fit`.

Usage: python models.py KIND [--epochs N] [--batch N] [--validate] [--early] [--kill STEPS] ...
"""

from __future__ import annotations

import argparse
import json
import os
import signal

import numpy as np

import hpc_elastic as he

he.keras.same_bits(threads=1, seed=1)

import keras  # noqa: E402  (after the settings that it reads when it starts)
from keras import layers, ops  # noqa: E402

SAMPLES, HELD_BACK, CLASSES = 500, 203, 4
rng = np.random.default_rng(0)


def cnn():
    """Return a convolutional network with batch normalisation and dropout, and images of stripes."""
    label = rng.integers(0, CLASSES, SAMPLES + HELD_BACK)
    grid = np.indices((12, 12))
    image = np.stack([np.sin(grid[c % 2] * (1 + c // 2)) for c in label])[..., None]
    image = (image + rng.normal(0, 1, image.shape)).astype(np.float32)
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.RandomFlip("horizontal"),
            layers.Conv2D(8, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.2),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    return model, {"image": image, "label": label}, {}


def words():
    """Return sequences of words; one of them tells the class."""
    label = rng.integers(0, CLASSES, SAMPLES + HELD_BACK)
    text = rng.integers(CLASSES, 50, (len(label), 10))
    text[np.arange(len(label)), rng.integers(0, 10, len(label))] = label
    return {"text": text.astype(np.int32), "label": label}


def lstm():
    """Return a recurrent network over embedded words."""
    model = keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            layers.Embedding(50, 12),
            layers.LSTM(16, dropout=0.1),
            layers.Dense(CLASSES),
        ]
    )
    return model, words(), {}


def attention():
    """Return an embedding with attention."""
    text = keras.Input((10,), dtype="int32")
    embedded = layers.Embedding(50, 16)(text)
    attended = layers.MultiHeadAttention(2, 8, dropout=0.1)(embedded, embedded)
    normal = layers.LayerNormalization()(attended + embedded)
    return keras.Model(text, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(normal))), words(), {}


def two_inputs():
    """Return a functional model with two inputs."""
    data = words()
    data["number"] = rng.normal(size=(len(data["label"]), 5)).astype(np.float32)
    text, number = keras.Input((10,), dtype="int32", name="words"), keras.Input((5,), name="numbers")
    both = layers.Concatenate()(
        [layers.Flatten()(layers.Embedding(50, 8)(text)), layers.Dense(8, activation="tanh")(number)]
    )
    model = keras.Model({"words": text, "numbers": number}, layers.Dense(CLASSES)(layers.BatchNormalization()(both)))
    return model, data, {"inputs": {"words": "text", "numbers": "number"}}


class Contrasting(keras.Model):
    """A model with a train_step of its own: noise on its inputs, a loss of two terms, a metric of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = layers.Dense(24, activation="relu")
        self.head = layers.Dense(CLASSES)
        self.noise = keras.random.SeedGenerator(3)
        self.spread = keras.metrics.Mean(name="spread")

    def call(self, x):
        return self.head(self.body(x))

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            noisy = x + keras.random.normal(ops.shape(x), stddev=0.1, seed=self.noise)
            predicted = self(noisy, training=True)
            apart = ops.mean(ops.square(predicted - self(x, training=True)))
            loss = self.compute_loss(y=y, y_pred=predicted) + 0.1 * apart
        self.optimizer.apply_gradients(
            zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        )
        self.spread.update_state(apart)
        for metric in self.metrics:
            if metric.name == "compile_metrics":
                metric.update_state(y, predicted)
        return {"spread": self.spread.result(), "both": loss}


def custom():
    """Return a model with a train_step of its own."""
    label = rng.integers(0, CLASSES, SAMPLES + HELD_BACK)
    point = (np.eye(CLASSES)[label] @ rng.normal(0, 1, (CLASSES, 8)) + rng.normal(0, 0.5, (len(label), 8))).astype(
        np.float32
    )
    return Contrasting(), {"point": point, "label": label}, {}


KINDS = {"cnn": cnn, "lstm": lstm, "attention": attention, "two_inputs": two_inputs, "custom": custom}


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--verbose", type=int, default=0)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--early", action="store_true", help="stop early, and let the learning rate go down")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--execution", type=int, default=1, help="steps_per_execution")
    parser.add_argument("--rate", type=float, help="a constant learning rate")
    parser.add_argument("--optimizer", type=json.loads, default={}, help="what else the optimizer is given")
    parser.add_argument("--rule", default="fixed", help="for the batch, which is that of a rank then, and the learning rate")
    parser.add_argument("--mixed", help="the policy")
    parser.add_argument("--scale", type=float, help="of the loss, at the beginning; it doubles after two good steps")
    parser.add_argument("--log", action="store_true", help="print what the leader alone should")
    parser.add_argument("--kill", type=int, help="a rank kills itself after so many steps")
    parser.add_argument("--evaluating", action="store_true", help="it does so when it evaluates")
    parser.add_argument("--everybody", action="store_true", help="it kills the others before")
    return parser.parse_args()


class Fatal(keras.callbacks.Callback):
    """Kills the last rank of several, or a single one, once: when a step is done, or when it evaluates after it."""

    def __init__(self, job, step, *, evaluating, everybody):
        super().__init__()
        self.job, self.step, self.evaluating, self.everybody = job, step, evaluating, everybody

    def on_train_batch_end(self, batch, logs=None):  # noqa: ARG002  (Keras's signature)
        self.kill(evaluating=False)

    def on_test_begin(self, logs=None):  # noqa: ARG002  (Keras's signature)
        self.kill(evaluating=True)

    def kill(self, *, evaluating):
        here = int(self.model.optimizer.iterations), evaluating
        if here == (self.step, self.evaluating) and self.job.rank == self.job.size - 1 and first():
            others = self.job.generation.members[:-1] if self.everybody else ()
            for pid in (*(member.pid for member in others), os.getpid()):
                os.kill(pid, signal.SIGKILL)


class Log(keras.callbacks.Callback):
    """Prints, on each rank that it is called on."""

    def on_train_begin(self, logs=None):  # noqa: ARG002  (Keras's signature)
        print("logging begins", flush=True)

    def on_epoch_end(self, epoch, logs=None):
        print("logged", epoch, sorted(logs), flush=True)


def first():
    """Return True once in a run."""
    try:
        os.close(os.open("killed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def train(job):
    given = parse()
    if given.mixed:
        keras.config.set_dtype_policy(given.mixed)
    model, arrays, fields = KINDS[given.kind]()
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
    constant = given.early or given.rule != "fixed"
    optimizer = keras.optimizers.Adam(given.rate or (0.01 if constant else schedule), **given.optimizer)
    if given.scale:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, given.scale, dynamic_growth_steps=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=given.execution)

    seen = {name: array[:SAMPLES] for name, array in arrays.items()}
    held_back = he.keras.data({name: array[SAMPLES:] for name, array in arrays.items()}, batch=40, **fields)
    rest = [keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)] if given.early else []
    rest += [keras.callbacks.ReduceLROnPlateau("loss", patience=1)] if given.early else []
    elastic = he.keras.Elasticity(job, keep=rest, rule=given.rule)
    fatal = Fatal(job, given.kill, evaluating=given.evaluating, everybody=given.everybody)
    others = [fatal] if given.kill else []
    others += [he.keras.OnLeader(job, Log())] if given.log else []
    history = model.fit(
        he.keras.data(seen, batch=given.batch, **fields),
        epochs=given.epochs,
        verbose=given.verbose,
        validation_data=held_back if given.validate else None,
        callbacks=[elastic, *rest, *others],
    )
    found = {}
    if given.predict:
        found = model.evaluate(held_back, callbacks=[elastic], return_dict=True, verbose=given.verbose)
        predicted = model.predict(held_back, callbacks=[elastic], verbose=0)
        found["right"] = float(np.mean(predicted.argmax(-1) == arrays["label"][SAMPLES:]))
        found["predicted"] = he.keras.weights_sha256([predicted])
    if given.rule == "adascale":
        os.write(1, f"adascale {elastic.adascale_steps}\n".encode())  # in one piece, since all ranks do
    if job.leads:
        print("sha256", he.keras.weights_sha256(model.get_weights()))
        print("history", history.history)
        print("iterations", int(model.optimizer.iterations), "epochs", len(history.epoch))
        print("found", found, flush=True)


if __name__ == "__main__":
    he.run(train)
