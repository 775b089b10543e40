"""Keras's `fit` in elastic jobs: five models through random timetables, the variants of `fit`, losses and restarts."""

from __future__ import annotations

import ast
import json

import pytest

from hpc_elastic import events

from ..afterwards import check_ledger, happened, resizes
from ..launch import SCRIPTS, Job, hpc_elastic
from ..rarely import also
from .test_same_bits import sizes
from .test_same_bits import timetable as random_timetable

pytestmark = pytest.mark.tensorflow
KINDS = ("cnn", "lstm", "attention", "two_inputs", "custom")
SEEDS = range(200, 205)
SAMPLES, EPOCHS, STEPS = 500, 3, 30
SOME = {("cnn", 200)}
EVERYTHING = ("--validate", "--predict")
ELASTIC = ("--slots", 5, "--max", 4, "--set", "ledger=true", "--hold")


def run(folder, options, script, code=0):
    """Run a model; return what it printed, without the launcher's part."""
    command = hpc_elastic("run", "--run-dir", "r", *options, SCRIPTS / "models.py", *script)
    with Job(command, folder=folder, limit_s=240) as job:
        done = job.wait()
    assert done.code == code, done.err
    return done


def from_the_start(ranks):
    """Return the options with which as many ranks do the first step."""
    return "--ranks", ranks, "--slots", ranks, "--hold"


def lines(done):
    """Return what several ranks printed, in whatever order."""
    return sorted(done.out.splitlines())


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """Return what one static rank prints for a script, which is run once."""
    known = {}

    def of(*script):
        if script not in known:
            known[script] = run(tmp_path_factory.mktemp("static"), (), script).out
        return known[script]

    return of


def test_random_timetables(kind, seed, static, tmp_path):
    table = random_timetable(seed, STEPS - 1)
    print(f"seed {seed}: {table}")
    done = run(tmp_path, (*ELASTIC, "--timetable", table), (kind, *EVERYTHING))
    assert done.out == static(kind, *EVERYTHING)  # weights, history, metrics, predictions
    assert [event.after for event in resizes(tmp_path / "r")] == sizes(table)
    check_ledger(tmp_path / "r", EPOCHS, SAMPLES)


def optimizer(**options):
    """Return the arguments that give the model's optimizer `options`."""
    return "--optimizer", json.dumps(options)


VARIANTS = {
    "early": ("cnn", "--validate", "--early", "--epochs", 8),
    "several": ("two_inputs", "--execution", 3, *optimizer(clipnorm=0.5, use_ema=True)),
    "together": (
        *("two_inputs", "--batch", 40, "--mixed", "mixed_float16", "--scale", 2.0**36),
        *optimizer(global_clipnorm=0.5, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3),
    ),
    "float16": ("lstm", "--mixed", "mixed_float16", "--validate"),
    "bfloat16": ("cnn", "--mixed", "mixed_bfloat16", "--validate"),
    "accumulate": ("two_inputs", "--batch", 40, *optimizer(gradient_accumulation_steps=2)),
    "clip": ("attention", *optimizer(clipnorm=0.1)),
    "clip_all": ("attention", *optimizer(global_clipnorm=0.1)),
    "average": ("cnn", "--validate", *optimizer(use_ema=True, ema_momentum=0.9)),
    "execution": ("cnn", "--execution", 4),
}


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("all_faults")
    if "seed" in metafunc.fixturenames:
        cases = [(kind, seed) for kind in KINDS for seed in SEEDS if every or (kind, seed) in SOME]
        metafunc.parametrize(("kind", "seed"), cases)
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", list(VARIANTS))


@pytest.mark.all_faults
def test_variants(variant, static, tmp_path):
    """Of `fit`, of optimizers and of precision: as on one static rank."""
    script = VARIANTS[variant]
    done = run(tmp_path, (*ELASTIC, "--timetable", "4:3,17:2-0"), script)
    assert done.out == static(*script)
    assert "nan" not in done.out
    assert [event.after for event in resizes(tmp_path / "r")] == [3, 2]
    if variant == "together":  # the scale of the loss is too large at first, so that steps are left out
        assert 0 < int(done.value("iterations").split()[0]) < 39 // 2


@pytest.mark.parametrize(("at", "step"), [(("--kill", 13), 13), also(("--kill", 20, "--evaluating"), 19)])
def test_a_rank_is_killed(at, step, static, tmp_path):
    """The others go on with the step in flight, or with the evaluation; the replacement comes in the midst of an epoch."""
    done = run(tmp_path, ("--slots", 3, "--timetable", "2:3", "--hold"), ("custom", *EVERYTHING, *at))
    assert done.out == static("custom", *EVERYTHING)
    assert [lost.step for lost in happened(tmp_path / "r", events.Lost)] == [step]
    assert not happened(tmp_path / "r", events.Restarted)


@pytest.mark.all_faults
def test_a_restart_within_an_epoch(static, tmp_path):
    """The only rank is lost in the second epoch; the job goes on at the checkpoint of step 10 or later, with its history."""
    done = run(tmp_path, ("--set", "checkpoint_steps=4"), ("custom", *EVERYTHING, "--kill", 18))
    assert done.out == static("custom", *EVERYTHING)
    assert len(happened(tmp_path / "r", events.Restarted)) == 1


@pytest.mark.parametrize("rule", ["adascale", "linear", "sqrt"])
@pytest.mark.all_faults
def test_a_batch_for_each_rank(rule, tmp_path):
    """Fewer steps with more ranks, each sample once, and a newcomer begins within an epoch; once more, the same bits."""
    script, again = ("cnn", "--validate", "--batch", 25, "--rule", rule), tmp_path / "again"
    again.mkdir()
    done = run(tmp_path, (*ELASTIC, "--timetable", "4:3,22:2-0"), script)
    assert lines(run(again, (*ELASTIC, "--timetable", "4:3,22:2-0"), script)) == lines(done)
    check_ledger(tmp_path / "r", EPOCHS, SAMPLES)
    assert int(done.value("iterations").split()[0]) < EPOCHS * SAMPLES // 25
    losses = ast.literal_eval(done.value("history"))["loss"]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0] / 2


@pytest.mark.all_faults
def test_adascale_remembers(tmp_path):
    """A restart from a checkpoint has the moments of all steps before, and AdaScale's own count of them."""
    options, script = (*from_the_start(2), "--set", "checkpoint_steps=4"), ("cnn", "--rule", "adascale")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = run(tmp_path / "whole", options, script)
    killed = run(tmp_path / "killed", options, (*script, "--kill", 9, "--everybody"))
    assert len(happened(tmp_path / "killed" / "r", events.Restarted)) == 1
    assert lines(killed) == lines(whole)
    steps = int(whole.value("iterations").split()[0])
    assert steps < float(whole.value("adascale")) <= 2 * steps


@pytest.mark.parametrize(("rule", "ranks", "factor"), [("linear", 2, 2), ("sqrt", 4, 2), ("adascale", 1, 1)])
@pytest.mark.all_faults
def test_what_rules_multiply(rule, ranks, factor, static, tmp_path):
    """The batch by the ranks, and the learning rate: the same bits as with both larger from the start."""
    done = run(tmp_path, from_the_start(ranks), ("cnn", "--batch", 25, "--rate", 0.01, "--rule", rule))
    assert done.value("sha256") in static("cnn", "--batch", 25 * ranks, "--rate", 0.01 * factor)


@pytest.mark.all_faults
def test_one_bar(tmp_path):
    """The leader alone draws Keras's bar, and logs, also when another one leads."""
    done = run(tmp_path, ("--slots", 3, "--timetable", "2:3,12:2-0", "--hold"), ("custom", "--verbose", 2, "--log"))
    for begin in ("10/10", "logged"):
        assert len([line for line in done.out.splitlines() if line.startswith(begin)]) == EPOCHS
    assert done.value("logging") == "begins"
    history = ast.literal_eval(done.value("history"))
    assert len(history["both"]) == EPOCHS
