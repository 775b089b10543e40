"""What Keras models are given, what is kept of callbacks, and what is refused; without a job."""

from __future__ import annotations

import importlib.util
import types

import numpy as np
import pytest

import hpc_elastic as he

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorflow") is None, reason="make setup installs TensorFlow with MPICH only"
    ),
]
SAMPLES, LEAVES = 50, 4


@pytest.fixture(scope="module", autouse=True)
def keras():
    he.keras.same_bits(threads=1)
    return pytest.importorskip("keras")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, 5)).astype(np.float32)
    return {"x": x, "label": (x.sum(1) > 0).astype(np.int64), "number": np.arange(SAMPLES)}


def build(keras, optimizer="sgd", **settings):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **settings)
    return model


# --- data -------------------------------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch(arrays):
    data = he.keras.data(arrays, batch=16, inputs="number", targets="label")
    orders = []
    data.on_epoch_end()  # as fit does before the first one
    for _ in range(2):
        data.on_epoch_begin()
        orders.append(np.concatenate([data[i][0] for i in range(len(data))]))
        data.on_epoch_end()
    assert [len(order) for order in orders] == [SAMPLES, SAMPLES]
    assert all(np.array_equal(np.sort(order), np.arange(SAMPLES)) for order in orders)
    assert not np.array_equal(*orders)


def test_without_a_job_it_is_a_data_set_of_keras(keras, arrays):
    model = build(keras, metrics=["accuracy"])
    data = he.keras.data(arrays, batch=16, inputs="x")
    history = model.fit(data, epochs=2, verbose=0)
    assert len(history.history["loss"]) == 2
    whole = model.predict({"x": arrays["x"]}["x"], verbose=0)
    np.testing.assert_allclose(model.predict(data, verbose=0), whole, rtol=1e-5)  # in their order, though shuffled in fit


def test_structures(arrays):
    several = he.keras.data(arrays, inputs={"a": "x", "b": "number"}, weights="number")
    inputs, label, weight = several[0]
    assert set(inputs) == {"a", "b"}
    assert len(inputs["a"]) == len(label) == len(weight) == SAMPLES
    assert he.keras.data({"x": arrays["x"]}).structure == ("x",)
    decoded = he.keras.data(arrays, inputs="both", decode=lambda fields, _: {**fields, "both": fields["x"] * 2})
    assert np.array_equal(decoded[0][0], 2 * arrays["x"])


def test_what_data_can_not_tell(arrays):
    with pytest.raises(he.ConfigError, match="name them"):
        he.keras.data(arrays)
    with pytest.raises(he.ConfigError, match="no field 'y'"):
        he.keras.data(arrays, inputs="x", targets="y")
    with pytest.raises(he.ConfigError, match="one length"):
        he.keras.data({"x": np.zeros(3), "label": np.zeros(4)})
    with pytest.raises(he.ConfigError, match="some of each"):
        he.keras.data({"x": np.zeros((0, 3)), "label": np.zeros(0)})


# --- what callbacks remember ------------------------------------------------------------------------------------------


def test_callbacks_are_taken_apart_and_put_together(keras):
    from hpc_elastic.keras.state import Callbacks

    early, other = keras.callbacks.EarlyStopping(), keras.callbacks.EarlyStopping()
    early.wait, early.best, early.best_weights = 2, np.float32(0.5), [np.ones((2, 3)), np.zeros(2)]
    early.own = {"a": [1, 2.5, None, "text"], "b": {}, "c": ()}
    state = Callbacks([early]).state()
    assert all(isinstance(value, (np.ndarray, int, float, str, type(None))) for value in state.values())
    Callbacks([other]).load(state)
    assert (other.wait, other.best, other.own) == (2, 0.5, {"a": [1, 2.5, None, "text"], "b": {}, "c": []})
    assert [np.array_equal(a, b) for a, b in zip(other.best_weights, early.best_weights, strict=True)] == [True, True]


def test_state_has_what_is_extra(keras):
    model, extra = build(keras), {"n": 3}
    state = he.keras.State(model, model.optimizer, extra).state()
    other = {"n": 0}
    he.keras.State(model, model.optimizer, other).load(state)
    assert other == {"n": 3}


# --- what is refused --------------------------------------------------------------------------------------------------


def traced(model, arrays, **options):
    from hpc_elastic.keras.traced import Traced

    return Traced(model, he.keras.data(arrays, inputs="x"), LEAVES, **options)


def test_eager_steps_and_schedules_with_a_rule_are_refused(keras, arrays):
    with pytest.raises(he.ConfigError, match="run_eagerly"):
        traced(build(keras, run_eagerly=True), arrays)
    with pytest.raises(he.ConfigError, match="compiled"):
        traced(keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]), arrays)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    with pytest.raises(he.ConfigError, match="schedule"):
        traced(build(keras, keras.optimizers.SGD(schedule)), arrays, rule="linear")
    with pytest.raises(he.ConfigError, match="there are fixed, linear"):
        he.keras.Elasticity(types.SimpleNamespace(), rule="cubic")


def test_a_step_that_applies_twice_or_uses_foreign_variables_is_refused(keras, arrays):
    import tensorflow as tf

    outside = tf.Variable(1.0)

    class Odd(keras.Sequential):
        twice = False

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=y, y_pred=self(x)) * (1.0 if self.twice else outside)
            gradients = tape.gradient(loss, self.trainable_variables)
            for _ in range(1 + self.twice):
                self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    def odd(kind=Odd):
        model = kind([keras.Input((5,)), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    class Clipped(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            for variable in self.trainable_variables:
                variable.assign(keras.ops.clip(variable, -1, 1))
            return logs

    with pytest.raises(he.ConfigError, match="changes weights itself"):
        traced(odd(Clipped), arrays)
    with pytest.raises(he.ConfigError, match="attributes of the model"):
        traced(odd(), arrays)
    twice = odd()
    twice.twice = True
    with pytest.raises(he.ConfigError, match="2 times"):
        traced(twice, arrays)


def test_seeds_differ():
    from hpc_elastic.keras.tracing import seed_words

    found = {seed_words(seed, step, micro) for seed in range(4) for step in range(20) for micro in range(16)}
    assert len(found) == 4 * 20 * 16
    assert all(0 <= word < 2**31 for words in found for word in words)
