"""The course of a run: what was lost is taken back, steps count over all loops; its picture and its log for TensorBoard."""

from __future__ import annotations

import builtins
import itertools
import subprocess
import sys

import pytest

from hpc_elastic import events
from hpc_elastic.course import Change, Value, whole
from hpc_elastic.errors import ConfigError, RunDirectoryError
from hpc_elastic.leftovers import HOST
from hpc_elastic.model import Member
from hpc_elastic.picture import draw
from hpc_elastic.rundir import Failure, RunDirectory, Status
from hpc_elastic.tensorboard import FAILED_S, write

from ..tensorboards import scalars

CLOCK = itertools.count(1000)
LOST = {"generation": 1, "members": (1,), "how": "was killed", "seconds": {"agree": 0.1}, "recovery_s": 0.1}


def now():
    return float(next(CLOCK))


def started(ranks=1):
    return events.Started(time=now(), script="train", mpi="MPICH", hosts=("a",), ranks=ranks)


def measured(step, loss, loop=1, **others):
    metrics = {"loss": loss, **others}
    return events.Measured(time=now(), loop=loop, epoch=0, step=step, samples=64, ranks=1, metrics=metrics)


def epoch(number, steps, loss):
    metrics = {"loss": loss}
    return events.Epoch(time=now(), epoch=number, step=steps - 1, ranks=1, samples=64, seconds=1.0, metrics=metrics)


def resized(step, before, after):
    return events.Resized(
        time=now(),
        generation=1,
        step=step,
        epoch=0,
        before=before,
        after=after,
        joined=(),
        left=(),
        reason="",
        stages={},
        standstill_s=0.2,
    )


def lost(step, before, after):
    return events.Lost(time=now(), step=step, before=before, after=after, lost_steps=1, **LOST)


def resumed(step, loop=1):
    return events.Resumed(time=now(), loop=loop, step=step, path="c", ranks=1)


def restarted():
    return events.Restarted(time=now(), attempt=2, step=30, reason="lost", wait_s=0.0)


def ended(steps):
    return events.Ended(time=now(), steps=steps, seconds=9.0, ranks=1)


def values(happened):
    return [(entry.step, entry.metrics["loss"]) for entry in whole(happened) if isinstance(entry, Value)]


def changes(happened):
    return [(entry.step, entry.ranks, entry.what) for entry in whole(happened) if isinstance(entry, Change)]


def test_resizes_and_losses():
    happened = [
        started(),
        measured(10, 1.0),
        resized(15, 1, 3),
        measured(20, 0.5),
        resized(25, 3, 2),
        lost(28, 2, 1),
        ended(30),
    ]
    assert values(happened) == [(10, 1.0), (20, 0.5)]
    assert changes(happened) == [
        (0, 1, "start"),
        (15, 3, "expand"),
        (25, 2, "shrink"),
        (28, 1, "loss"),
        (28, 0, "end"),
    ]


def test_a_lost_leader_had_told_of_the_step_that_is_done_again():
    happened = [started(2), measured(10, 1.0), measured(20, 0.5), lost(19, 2, 1), measured(20, 0.5), measured(30, 0.4)]
    assert values(happened) == [(10, 1.0), (20, 0.5), (30, 0.4)]


def test_a_restart_takes_back_what_came_after_the_checkpoint():
    before = [started(), measured(10, 1.0), measured(20, 0.5), epoch(0, 20, 0.7), measured(30, 0.4), restarted()]
    happened = [*before, started(), resumed(20), measured(30, 0.4)]
    assert values(happened) == [(10, 1.0), (20, 0.5), (20, 0.7), (30, 0.4)]
    assert changes(happened) == [(0, 1, "start"), (30, 0, "restart"), (20, 1, "start")]


@pytest.mark.parametrize("first", [measured(10, 1.0), epoch(0, 10, 1.0)])
def test_a_restart_from_the_start(first):
    assert values([started(), measured(10, 1.0), measured(20, 0.5), restarted(), started(), first]) == [(10, 1.0)]


def test_a_rewind_goes_back_as_well():
    back = events.Rewound(time=now(), loop=1, step=15, before=25, source="memory", seconds=0.1, ranks=1)
    happened = [started(2), measured(10, 1.0), measured(20, 0.5), lost(25, 2, 1), back, measured(20, 0.5)]
    assert values(happened) == [(10, 1.0), (20, 0.5)]
    assert changes(happened)[-1] == (15, 1, "rewind")


def test_steps_count_over_all_loops():
    happened = [started(), measured(10, 1.0), measured(20, 0.5), measured(10, 3.0, loop=2), resized(15, 1, 2)]
    assert values(happened) == [(10, 1.0), (20, 0.5), (30, 3.0)]
    assert changes(happened)[-1] == (35, 2, "expand")
    again = [*happened, measured(20, 2.0, loop=2), restarted(), started(), resumed(10, loop=2), measured(20, 2.0, loop=2)]
    assert values(again) == [(10, 1.0), (20, 0.5), (30, 3.0), (40, 2.0)]
    assert values([*again, restarted(), started(), resumed(10), measured(20, 0.5)]) == [(10, 1.0), (20, 0.5)]


# --- what is made of it -----------------------------------------------------------------------------------------------


def recorded(run, *happened):
    log = events.EventLog(run.events)
    for event in happened:
        log.write(event)
    return run


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


EVENTFUL = (
    *(started(2), measured(10, 100.0, accuracy=0.1), measured(20, 1.0, accuracy=0.5, val_loss=2.0), epoch(0, 20, 1.5)),
    *(lost(25, 2, 1), measured(30, 0.5, accuracy=float("nan")), restarted(), started(), resumed(20), resized(20, 1, 2)),
    *(measured(30, 0.5, accuracy=0.8), epoch(1, 40, 0.4), ended(40)),
)


def test_picture(run, tmp_path):
    recorded(run, *EVENTFUL)
    draw(run, tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    for word in ("loss", "val_loss", "accuracy", "epoch", "ranks", "expand", "restart", "time in s", "train, run"):
        assert f">{word}<" in text, word
    assert ">shrink<" not in text
    draw(run, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_picture_of_a_job_without_metrics(run, tmp_path):
    draw(recorded(run, started(), resized(50, 1, 2), ended(90)), tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert ">ranks<" in text
    assert ">step<" not in text


def test_no_picture_of_nothing(run, tmp_path):
    for happened in ((), (started(),)):
        with pytest.raises(RunDirectoryError, match="no step that could be drawn yet: see `hpc-elastic status"):
            draw(recorded(run, *happened), tmp_path / "run.svg")
    recorded(run, measured(1, 1.0))
    with pytest.raises(ConfigError, match=r"nowhere/run\.svg can't be written: No such file"):
        draw(run, tmp_path / "nowhere" / "run.svg")


@pytest.mark.parametrize(("name", "make"), [("matplotlib", draw), ("tensorboard", lambda *a: write(*a, follow=False))])
def test_what_is_missing(name, make, run, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] == name and not rest[-1]:
            raise ImportError(module)
        return real(module, *rest)

    recorded(run, started(), measured(1, 1.0))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=rf"pip install 'hpc_elastic\[{'pictures' if name == 'matplotlib' else name}\]'"):
        make(run, tmp_path / "out")


def test_log(run):
    pytest.importorskip("tensorboard")
    recorded(run, *EVENTFUL)
    for _ in range(2):  # the second one takes the first one's place
        path = write(run, run.tensorboard, follow=False)
        assert list(run.tensorboard.iterdir()) == [path]
        seen = scalars(run.tensorboard)
        assert seen["loss"] == [(10, 100.0), (20, 1.0), (30, 0.5)]
        assert seen["epoch/loss"] == [(20, 1.5), (40, pytest.approx(0.4))]
        assert seen["accuracy"] == [(10, pytest.approx(0.1)), (20, 0.5), (30, pytest.approx(0.8))]


def test_logs_of_two_runs(run, tmp_path, monkeypatch):
    """Each takes the place of its own alone; and where TensorBoard is missing, all stay."""
    pytest.importorskip("tensorboard")
    other = RunDirectory.create(tmp_path / "other")
    logs = set()
    for each in (run, other, run):
        recorded(each, started(), measured(1, 1.0))
        logs.add(write(each, tmp_path / "logs", follow=False))
    kept = set((tmp_path / "logs").iterdir())
    assert kept <= logs
    assert len({path.name.partition("hpc_elastic")[2] for path in kept}) == len(kept) == 2
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(ConfigError, match="needs it"):
        write(run, tmp_path / "logs", follow=False)
    assert set((tmp_path / "logs").iterdir()) == kept


def test_log_of_a_run_that_goes_on(run):
    """It is followed over a restart, to its end."""
    pytest.importorskip("tensorboard")
    parts = [(EVENTFUL[:3], "running"), (EVENTFUL[3:7], "running"), (EVENTFUL[7:9], "starting"), (EVENTFUL[9:], "ended")]
    steps = iter(parts)

    def go_on(_seconds):
        happened, state = next(steps)
        recorded(run, *happened)
        run.put_status(Status(state=state, time=0.0, started=0.0))

    write(run, run.tensorboard, follow=True, pause=go_on)
    assert not list(steps)
    assert scalars(run.tensorboard)["loss"] == [(10, 100.0), (20, 1.0), (30, 0.5)]


def paused(run):
    """Write the log until it is taken for over, and return for how long, by a clock of its own."""
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        assert sum(pauses) < 10 * FAILED_S

    write(run, run.tensorboard, follow=True, pause=pause)
    return sum(pauses)


def test_log_of_a_run_that_failed_for_good(run):
    pytest.importorskip("tensorboard")
    recorded(run, started(), measured(1, 1.0))
    run.put_status(Status(state="running", time=0.0, started=0.0))
    run.fail(Failure(error="no MPI", traceback="", member=0, rank=0, host="a", generation=0, step=1))
    assert FAILED_S <= paused(run) <= FAILED_S + 2


def test_log_of_a_run_that_was_killed_with_all_who_could_say_so(run):
    pytest.importorskip("tensorboard")
    with subprocess.Popen(["true"]) as process:
        gone = Member(id=0, pid=process.pid, host=HOST)
    run.put_status(Status(state="running", time=0.0, started=0.0, ranks=1, members=(gone,)))
    assert FAILED_S <= paused(run) <= FAILED_S + 2
