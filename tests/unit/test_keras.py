"""What Keras models are given, what is kept of callbacks, and what is refused; without a job."""

from __future__ import annotations

import mmap
import sys
import types

import numpy as np
import pytest

import hpc_elastic as he

pytestmark = pytest.mark.tensorflow
SAMPLES, LEAVES = 50, 4


def word(_):
    """Nothing that has to be agreed upon."""
    return np.zeros(4, np.int64)


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
    with pytest.raises(he.ConfigError, match=r"data: batch must be an integer, not 16\.0"):
        he.keras.data(arrays, batch=16.0, inputs="x")
    assert type(he.keras.data(arrays, batch=np.int32(16), inputs="x").batch) is int
    with pytest.raises(he.ConfigError, match="some of each"):
        he.keras.data({"x": np.zeros((0, 3)), "label": np.zeros(0)})


# --- what callbacks remember ------------------------------------------------------------------------------------------


def test_callbacks_are_taken_apart_and_put_together(keras):
    from hpc_elastic.keras.state import Callbacks

    early, other = keras.callbacks.EarlyStopping(), keras.callbacks.EarlyStopping()
    early.wait, early.best, early.best_weights = 2, np.float32(0.5), [np.ones((2, 3)), np.zeros(2)]
    early.own = {"a": [1, 2.5, None, "text"], "b": {}, "c": (), "by_epoch": {3: 0.5, -1: {"x": 1}}}
    early.odd = [{"a:b": 1}, {1: 2, "x": 3}, 2**64]
    other.odd = ["its own"] * 3
    state = Callbacks([early]).state()
    assert all(isinstance(value, (np.ndarray, int, float, str, type(None))) for value in state.values())
    Callbacks([other]).load(state)
    assert (other.wait, other.best, other.own) == (2, 0.5, {**early.own, "c": []})
    assert other.odd == ["its own"] * 3  # what can't be sent as it is stays as it was
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
    frozen = build(keras)
    frozen.trainable = False
    with pytest.raises(he.ConfigError, match="no weights"):
        traced(frozen, arrays)
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


def own_step(keras, then):
    """Return a compiled model whose train_step does `then` after Keras's."""

    class Own(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            return logs | (then(self) or {})

    model = Own([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_changes_are_found_whatever_makes_them(keras, arrays):
    import tensorflow as tf

    def slices(model):
        model.trainable_variables[0].value[0].assign(tf.zeros(2))

    def inside(model):
        tf.function(lambda: model.trainable_variables[1].assign(tf.zeros(2)), autograph=False)()

    def rate(model):
        model.optimizer.learning_rate.assign(0.5)

    def reads(model):
        weights = model.trainable_variables[0].value
        return {"norm": tf.cond(weights[0, 0] > 0, lambda: tf.norm(weights), lambda: tf.function(tf.norm)(weights))}

    for then in (slices, inside):
        with pytest.raises(he.ConfigError, match="changes weights itself"):
            traced(own_step(keras, then), arrays)
    with pytest.raises(he.ConfigError, match=r"optimizer's .*learning_rate"):
        traced(own_step(keras, rate), arrays)
    traced(own_step(keras, reads), arrays)


def test_random_numbers_of_tensorflow_are_refused(keras, arrays):
    import tensorflow as tf

    def noisy(draw):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(draw), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    inside = tf.function(lambda x: x + tf.random.normal(tf.shape(x)))
    for draw in (lambda x: tf.nn.dropout(x, 0.5), inside):
        with pytest.raises(he.ConfigError, match="train_step draws random numbers by TensorFlow's Random"):
            traced(noisy(draw), arrays)
    with pytest.raises(he.ConfigError, match="predict_step draws"):
        evaluation(noisy(inside)).predict(he.keras.data(arrays, inputs="x"))


def test_losses_that_are_no_means_are_refused(keras, arrays):
    model = build(keras)
    for reduction in ("sum", "mean_with_sample_weight", None):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        model.compile("sgd", loss)
        with pytest.raises(he.ConfigError, match="reduction="):
            traced(model, arrays)


def test_metrics_that_do_not_add_are_refused(keras, arrays):
    class Own(keras.metrics.Metric):
        def __init__(self, adds):
            super().__init__(name="own")
            self.adds, self.value = adds, self.add_variable((), "zeros", name="value")

        def update_state(self, y_true, y_pred, sample_weight=None):  # noqa: ARG002  (Keras's signature)
            most = keras.ops.max(y_pred)
            self.value.assign(self.value + most if self.adds else keras.ops.maximum(self.value, most))

        def result(self):
            return self.value

    with pytest.raises(he.ConfigError, match="own/value is no sum"):
        traced(build(keras, metrics=["accuracy", Own(adds=False)]), arrays)
    model = build(keras, metrics=["accuracy", Own(adds=True)])
    traced(model, arrays)
    assert all(not np.any(variable) for variable in model.metrics_variables)


def test_adascale_needs_microbatches(keras, arrays):
    from hpc_elastic.keras.traced import Traced

    data = he.keras.data(arrays, inputs="x")
    with pytest.raises(he.ConfigError, match="microbatches to 2 or more"):
        Traced(build(keras), data, 1, "adascale")
    step = Traced(build(keras), data, LEAVES, "adascale")
    step.run(Alone(arrays, 1), word)  # the last batch may have a single sample
    assert step.adascale.memory["weight"] == 0
    step.run(Alone(arrays, SAMPLES), word)
    assert step.adascale.memory["weight"] > 0


def test_adascale_remembers_gradients_without_the_scale_of_the_loss(keras, arrays):
    memories = []
    for scale in (None, 8.0, 1024.0):
        keras.utils.set_random_seed(0)
        optimizer = keras.optimizers.SGD()
        if scale:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
        step = traced(build(keras, optimizer), arrays, rule="adascale")
        step.run(Alone(arrays, SAMPLES), word)
        memories.append(step.adascale.memory)
    assert memories[1] == pytest.approx(memories[0], rel=1e-4)
    assert memories[2] == pytest.approx(memories[0], rel=1e-4)


def test_steps_are_watched_whatever_the_optimizer_counts(keras, arrays):
    """With accumulation Keras tells of fewer steps than it has done, which is a tensor and no variable."""
    for accumulates in (None, 2):
        for scaled in (lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = scaled(keras.optimizers.SGD(gradient_accumulation_steps=accumulates))
            step, seen = traced(build(keras, optimizer), arrays), []
            for _ in range(3):
                step.run(Alone(arrays, SAMPLES), lambda found, seen=seen: seen.append(int(found[1])) or word(found))
            assert seen[::LEAVES] == [0, 1, 2]


# --- a step and an evaluation without other ranks ---------------------------------------------------------------------


class Alone:
    """Stands in for a step of one rank: its microbatches, weighed by their samples."""

    number = 7

    def __init__(self, arrays, size):
        from hpc_elastic.runtime.batches import Microbatch
        from hpc_elastic.sampler import microbatches

        self.size, self.metrics, self.added = size, {}, []
        self.micros = [
            Microbatch(i, np.arange(start, stop), {name: array[start:stop] for name, array in arrays.items()})
            for i, (start, stop) in enumerate(microbatches(size, LEAVES))
            if start < stop
        ]

    def begin(self):
        return self.micros

    def take(self, micro):
        self.weight = len(micro) / self.size

    def add(self, values, sums):
        self.added.append(([self.weight * value for value in values], [one.copy() for one in sums]))

    def exchange(self):
        return True

    def reduce(self):
        return tuple([sum(column) for column in zip(*part, strict=True)] for part in zip(*self.added, strict=True))


def evaluation(model):
    from hpc_elastic.keras.evaluation import Evaluation

    config = types.SimpleNamespace(microbatches=LEAVES, seed=3)
    return Evaluation(
        types.SimpleNamespace(joined=False, membership=None, session=types.SimpleNamespace(config=config)), model
    )


def test_metrics_with_several_numbers(keras, arrays):
    arrays["hot"] = np.eye(2, dtype=np.float32)[arrays["label"]]
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, activation="softmax")])
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy", keras.metrics.F1Score()])
    whole = model.evaluate(arrays["x"], arrays["hot"], return_dict=True, verbose=0)  # weights are as before a step

    from hpc_elastic.keras.traced import Traced

    data = he.keras.data(arrays, inputs="x", targets="hot")
    found = evaluation(model).evaluate(data)
    assert {name: np.shape(value) for name, value in found.items()} == {"loss": (), "accuracy": (), "f1_score": (2,)}
    model.reset_metrics()
    logs, _ = Traced(model, data, LEAVES).run(Alone(arrays, SAMPLES), word)
    for name, value in logs.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5)
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5)
    assert isinstance(logs["accuracy"], float)


def test_a_step_refuses_logs_without_a_fixed_shape(keras, arrays):
    import tensorflow as tf

    with pytest.raises(he.ConfigError, match="returns 'each' of shape"):
        traced(own_step(keras, lambda own: {"each": tf.where(own.trainable_variables[0].value > 0)}), arrays)


def test_samples_of_another_kind_are_refused(keras, arrays):
    step = traced(build(keras), arrays)
    for other in (arrays["x"].astype(np.float64), arrays["x"][:, :4]):
        with pytest.raises(he.ConfigError, match="field 'x' has samples of"):
            step.run(Alone(arrays | {"x": other}, SAMPLES), word)


def test_memory_is_lent_where_that_can_be():
    from hpc_elastic.keras.values import lent

    floats = np.ndarray(64, np.float32, mmap.mmap(-1, 4096))
    floats[:] = 1
    read_only = floats[:]
    read_only.flags.writeable = False
    references = sys.getrefcount(floats)
    within = [lent(floats), lent(floats[16:])]
    apart = [lent(array) for array in (floats[1:], floats[::2], read_only)]  # where TensorFlow would not, or DLPack can't
    assert sys.getrefcount(floats) == references + len(within)  # so it is not filled again
    floats[:] = 2
    assert all(np.all(np.asarray(tensor) == 2) for tensor in within)
    assert all(np.all(np.asarray(tensor) == 1) for tensor in apart)
    del within
    assert sys.getrefcount(floats) == references


@pytest.mark.parametrize("keeps", [False, True])
def test_the_sum_is_lent_and_no_variable_keeps_it(keras, arrays, keeps):
    """Also where an optimizer assigns gradients as they are; then what it kept is copied."""

    class Keeps(keras.optimizers.SGD):
        def build(self, variables):
            super().build(variables)
            self.last = [self.add_variable_from_reference(variable, "last") for variable in variables]

        def update_step(self, gradient, variable, learning_rate):
            self.assign(self.last[self._get_variable_index(variable)], gradient)
            super().update_step(gradient, variable, learning_rate)

    class Lending(Alone):
        def reduce(self):
            parts = super().reduce()
            self.lent = np.ndarray(parts[0][0].shape, np.float32, mmap.mmap(-1, 4096))
            self.lent[...] = parts[0][0]
            self.only_read = self.lent[:]
            self.only_read.flags.writeable = False
            return [self.only_read], parts[1]

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2, use_bias=False)])
    optimizer = Keeps() if keeps else keras.optimizers.SGD(momentum=0.5, use_ema=True)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    (step, step_of), copied = (traced(model, arrays), Lending(arrays, SAMPLES)), []
    let_go = step._let_go
    step._let_go = lambda: copied.append(let_go())
    step.run(step_of, word)
    assert len(copied) == keeps
    before = [np.asarray(variable).copy() for variable in [*model.variables, *optimizer.variables]]
    step_of.lent[...] = np.nan
    after = [np.asarray(variable).copy() for variable in [*model.variables, *optimizer.variables]]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_evaluation_may_look_up_and_read(keras, arrays):
    """What newcomers have as well: tables, which don't change, and variables of the script's own."""
    import tensorflow as tf

    scale = tf.Variable(2.0)
    table = keras.layers.IntegerLookup(vocabulary=list(range(SAMPLES)), num_oov_indices=1)
    model = keras.Sequential(
        [keras.Input((), dtype="int64"), table, keras.layers.Lambda(lambda x: scale * tf.cast(x, "float32"))]
    )
    data = he.keras.data({"number": arrays["number"]}, batch=7)
    assert np.array_equal(evaluation(model).predict(data), 2 * (arrays["number"] + 1))


def test_what_an_evaluation_draws_depends_on_the_part_alone(keras, arrays, monkeypatch):
    class Noisy(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(5)
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)

    model = keras.Sequential([keras.Input((5,)), Noisy(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    data, found = he.keras.data(arrays, batch=5, inputs="x"), evaluation(model)
    before = [np.asarray(variable) for variable in model.variables]
    predicted = np.asarray(found.predict(data))
    losses = [found.evaluate(data)["loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    monkeypatch.setattr(found, "_interval", lambda: (2, LEAVES))  # that of another rank
    last = np.asarray(found.predict(data))
    assert np.array_equal(last, predicted[-len(last) :])
    assert not np.array_equal(predicted[:5], np.asarray(model.layers[-1](arrays["x"][:5])))  # there is noise
    assert all(np.array_equal(a, b) for a, b in zip(before, model.variables, strict=True))


def test_an_evaluation_refuses_what_would_differ_by_rank(keras, arrays):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Lambda(lambda x: x + keras.random.normal((5,)))])
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(he.ConfigError, match=r"predict_step changes .*seed_generator"):
        evaluation(model).predict(he.keras.data(arrays, inputs="x"))


def test_seeds_differ():
    from hpc_elastic.keras.tracing import seed_words

    found = {seed_words(seed, step, micro) for seed in range(4) for step in range(20) for micro in range(16)}
    assert len(found) == 4 * 20 * 16
    assert all(0 <= word < 2**31 for words in found for word in words)
