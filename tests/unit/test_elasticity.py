"""The Keras callbacks without ranks: what they refuse, and what a stopping job leaves out."""

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


@pytest.fixture(scope="module", autouse=True)
def keras():
    he.keras.same_bits(threads=1)
    return pytest.importorskip("keras")


def test_what_would_work_on_one_rank_alone_is_refused(keras):
    with pytest.raises(he.ConfigError, match="checkpoints of the job"):
        he.keras.OnLeader(types.SimpleNamespace(), keras.callbacks.BackupAndRestore("backup"))


def test_what_bits_depend_on(monkeypatch):
    from hpc_elastic.keras import settings

    settings.check()
    before = settings.of_bits()
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    assert settings.of_bits() != before
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_auto_jit=2")
    with pytest.raises(he.ConfigError, match="XLA"):
        settings.check()


def test_a_stopping_job_does_not_validate(keras):
    """The job is a fake one, that has none of what an evaluation by its ranks would use."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    elastic = he.keras.Elasticity(types.SimpleNamespace(stopped=True, leads=True))
    elastic._called_in_fit = True
    elastic._state.tested = {"loss": np.asarray(2.5)}
    data = he.keras.data({"x": np.zeros((50, 5), np.float32), "label": np.zeros(50, np.int64)})
    assert model.evaluate(data, callbacks=[elastic], return_dict=True, verbose=0) == {"loss": 2.5}


def test_an_evaluation_by_another_one_leaves_fit_its_train_function(keras):
    """A callback evaluates with an `Elasticity` of its own, in a `fit` that has one."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    config = types.SimpleNamespace(microbatches=4, seed=0)
    job = types.SimpleNamespace(stopped=False, leads=True, joined=False, session=types.SimpleNamespace(config=config))
    model.train_function = in_fit = object()
    data = he.keras.data({"x": np.ones((50, 5), np.float32), "label": np.zeros(50, np.int64)})
    model.evaluate(data, callbacks=[he.keras.Elasticity(job)], verbose=0)
    assert model.train_function is in_fit


@pytest.mark.parametrize("built", [True, False])
def test_a_model_that_is_not_compiled_predicts(keras, built):
    model = keras.Sequential([*([keras.Input((5,))] if built else []), keras.layers.Dense(2)])
    config = types.SimpleNamespace(microbatches=4, seed=0)
    job = types.SimpleNamespace(stopped=False, leads=True, joined=False, session=types.SimpleNamespace(config=config))
    x = np.ones((50, 5), np.float32)
    found = model.predict(he.keras.data({"x": x}), callbacks=[he.keras.Elasticity(job)], verbose=0)
    np.testing.assert_array_equal(found, model(x))


def test_words_tell_whether_all_are_alike(keras):
    from hpc_elastic.keras.accord import Accord

    def accord(rate, *, leads):
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
        model.compile(keras.optimizers.SGD(rate), "mse")
        model.history = keras.callbacks.History()
        return Accord(types.SimpleNamespace(leads=leads, joined=False), model, [], weights=True), model

    (leader, first), (other, second), (odd, _) = accord(0.1, leads=True), accord(0.1, leads=False), accord(0.2, leads=False)

    def word(of):
        return of.word([np.asarray(variable) for variable in of._watched])

    first.stop_training = second.stop_training = False
    leader.heed(3 * word(leader) + 5 * word(other))
    with pytest.raises(he.ConfigError, match="keep="):
        other.heed(3 * word(leader) + 4 * word(other) + word(odd))
    second.stop_training = True  # which is the wish of one that does not lead
    second.history.on_train_batch_end(0)
    other.heed(word(leader) + word(other))
    assert not second.stop_training
    first.stop_training = True
    first.history.on_train_batch_end(0)
    assert not first.stop_training
    other.heed(word(leader) + word(other))
    assert second.stop_training
