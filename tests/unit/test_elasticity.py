"""The Keras callbacks without ranks: what they refuse, and what a stopping job leaves out."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest

import hpc_elastic as he
from hpc_elastic.model import Cursor

pytestmark = pytest.mark.tensorflow


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
    for name, value in (("TF_ENABLE_ONEDNN_OPTS", "0"), ("ONEDNN_MAX_CPU_ISA", "AVX2")):
        monkeypatch.setenv(name, value)
        assert settings.of_bits() != before
        monkeypatch.delenv(name)
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_auto_jit=2")
    with pytest.raises(he.ConfigError, match="XLA"):
        settings.check()


def test_a_stopping_job_does_not_validate(keras):
    """The job is a fake one, that has none of what an evaluation by its ranks would use."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    here = types.SimpleNamespace(cursor=Cursor(0, 0, 0))
    elastic = he.keras.Elasticity(types.SimpleNamespace(stopped=True, leads=True, here=here))
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
        job = types.SimpleNamespace(leads=leads, joined=False, membership=types.SimpleNamespace(leader=None))
        return Accord(job, model, [], weights=True), model

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


def test_processors_that_differ_are_told_of_once(keras, monkeypatch, tmp_path):
    from hpc_elastic.keras import accord, settings

    def rank(flags, *, leads):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n\nprocessor : 1\nflags\t\t: fpu {flags}\n")
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        model.history = keras.callbacks.History()
        monkeypatch.setattr(settings, "instructions", functools.partial(instructions, file))
        reports = types.SimpleNamespace(say=said.append)
        membership = types.SimpleNamespace(leader=types.SimpleNamespace(reports=reports) if leads else None)
        job = types.SimpleNamespace(leads=leads, joined=False, membership=membership)
        return accord.Accord(job, model, [], weights=True)

    said: list[str] = []
    instructions = settings.instructions
    monkeypatch.setattr(accord.Accord, "_told", False)
    most = "avx fma avx2 avx512f"
    new, same, old = rank(most, leads=True), rank(most, leads=False), rank("avx", leads=False)
    words = [each.word([]) for each in (new, same, old)]
    new.heed(3 * words[0] + 5 * words[1])
    assert not said
    for each in (new, same, old, new):
        each.heed(3 * words[0] + 5 * words[2])
    assert [text.partition(".")[0] for text in said] == ["the ranks' processors differ: not all have fma, avx2, avx512f"]
    monkeypatch.setenv(settings.LARGEST_SET, "AVX")
    assert not any(instructions())


def test_histories_come_back_as_they_were(keras, tmp_path):
    from hpc_elastic.keras import histories
    from hpc_elastic.rundir import RunDirectory

    said: list[str] = []
    leader = types.SimpleNamespace(reports=types.SimpleNamespace(say=said.append))
    job = types.SimpleNamespace(
        session=types.SimpleNamespace(run=RunDirectory.create(tmp_path / "run")),
        here=types.SimpleNamespace(loop=2),
        membership=types.SimpleNamespace(leader=leader),
    )
    left, found = keras.callbacks.History(), keras.callbacks.History()
    several = np.array([[0.1, np.nan, 3.0]], np.float32)
    left.history = {"loss": [0.5, float("nan")], "several": [several, np.empty((0, 3), np.int8)]}
    histories.write(job, left)
    histories.read(job, found)
    np.testing.assert_equal(found.history, left.history)
    for got, put in zip(found.history["several"], left.history["several"], strict=True):
        assert (got.dtype, got.shape) == (put.dtype, put.shape)
    (tmp_path / "run").rename(tmp_path / "gone")
    histories.write(job, left)
    assert len(said) == 1
    assert "No such file" in said[0]


def test_a_plain_fit_after_an_elastic_one_has_its_callbacks(keras):
    """The job still stands where its last loop has ended, in a later epoch."""
    cursor = types.SimpleNamespace(epoch=3)
    job = types.SimpleNamespace(leads=True, here=types.SimpleNamespace(cursor=cursor))
    epochs: list[int] = []
    once = he.keras.OnLeader(job, keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, _: epochs.append(epoch)))
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((4, 5)), np.zeros((4, 2)), epochs=2, callbacks=[once], verbose=0)
    assert epochs == [0, 1]
