"""What is shown while a job runs, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import msgspec
import pytest

from hpc_elastic.config import SUPERVISED_VARIABLE
from hpc_elastic.errors import ShardError
from hpc_elastic.progress import PLAIN_EVERY_S, Progress, counting, describe
from hpc_elastic.rundir import Status

BASE = Status(
    state="running",
    time=1.0,
    started=0.0,
    ranks=2,
    epoch=1,
    epochs=5,
    step=40,
    steps=160,
    samples_per_s=1234.4,
    metrics={"loss": 0.25},
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal; pytest would undo it if the fixture itself did."""

    def make():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "150")
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def but(**changes):
    return msgspec.structs.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "epoch 2/5, step 40/160, 1,234 samples/s, 2 ranks, loss 0.25"),
        ({"under_way": "2 -> 3 ranks"}, "epoch 2/5, step 40/160, 1,234 samples/s, 2 ranks, loss 0.25 (2 -> 3 ranks)"),
        ({"epoch": 5, "ranks": 1, "metrics": {}}, "epoch 5/5, step 40/160, 1,234 samples/s, 1 rank"),
        ({"unit": "turns", "epochs": 1, "metrics": {}}, "turn 40/160, 1,234 turns/s, 2 ranks"),
        ({"samples_per_s": 0.0, "metrics": {}}, "epoch 2/5, step 40/160, 2 ranks"),
        ({"parked": 1, "metrics": {}}, "epoch 2/5, step 40/160, 1,234 samples/s, 2 ranks, 1 parked"),
        (
            {"epoch": 0, "epochs": 0, "step": 0, "steps": 0, "samples_per_s": 0.0, "metrics": {}},
            "epoch 1/1, step 0/0, 2 ranks",
        ),
    ],
)
def test_describe(changes, line):
    assert describe(but(**changes)) == line


def test_plain_lines(clock, capsys):
    """One at every change of state, ranks or epoch, and one now and then."""
    progress = Progress("plain", clock)
    progress.show(BASE)
    clock.now += PLAIN_EVERY_S / 2
    progress.show(but(step=41))
    assert len(capsys.readouterr().err.splitlines()) == 1
    clock.now += PLAIN_EVERY_S / 2
    progress.show(but(step=42))
    progress.show(but(step=43, ranks=3))
    progress.show(but(step=44, ranks=3, epoch=2))
    progress.show(but(step=45, ranks=3, epoch=2, under_way="3 -> 4 ranks"))
    out, err = capsys.readouterr()
    assert not out
    assert [line.split(",")[1] for line in err.splitlines()] == [
        " step 42/160",
        " step 43/160",
        " step 44/160",
        " step 45/160",
    ]
    progress.show(but(state="ended"))
    clock.now += 10 * PLAIN_EVERY_S
    progress.show(but(state="ended"))
    progress.close()
    assert capsys.readouterr().err.splitlines() == [f"ended: {describe(BASE)}"]


def test_rate_is_kept_where_an_epoch_begins(clock, capsys):
    progress = Progress("plain", clock)
    progress.show(BASE)
    progress.show(but(time=2.0, epoch=2, samples_per_s=0.0))
    assert [line.split(", ")[2] for line in capsys.readouterr().err.splitlines()] == ["1,234 samples/s"] * 2


def test_rate_is_smoothed_once_a_status(clock, capsys):
    """A status may be seen several times, since the supervisor looks more often than the leader writes."""
    progress = Progress("plain", clock)
    progress.show(but(samples_per_s=1000.0))
    for _ in range(5):
        progress.show(but(time=2.0, epoch=2, samples_per_s=2000.0))
    progress.show(but(time=3.0, state="ended", samples_per_s=2000.0))
    rates = [line.split(", ")[2] for line in capsys.readouterr().err.splitlines()]
    assert rates == ["1,000 samples/s", "1,300 samples/s", "2,000 samples/s"]


def test_off(clock, capsys):
    progress = Progress("off", clock)
    progress.show(BASE)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_bar(clock, terminal):
    screen = terminal()
    progress = Progress("bar", clock)
    progress.show(but(metrics={"loss [bold]": 0.25}))
    progress.show(but(time=2.0, step=80, ranks=3, metrics={"loss [bold]": 0.125}, under_way="3 -> 4 ranks"))
    progress.close()
    assert "epoch 2/5" in screen.getvalue()
    assert "step 80/160, 1,234 samples/s, 3 ranks, loss [bold] 0.125 (3 -> 4 ranks)" in screen.getvalue()
    progress.close()


def test_bar_says_how_it_ended(clock, terminal):
    screen = terminal()
    progress = Progress("bar", clock)
    progress.show(but(state="stopped"))
    progress.close()
    assert "stopped, epoch 2/5" in screen.getvalue()


def test_what_is_told_stands_above_the_bar(terminal, clock):
    screen = terminal()
    progress = Progress("bar", clock)
    progress.show(BASE)
    progress.tell("a [bold] word")
    progress.show(BASE)
    progress.close()
    progress.tell("another")
    text = screen.getvalue()
    assert "a [bold] word\n" in text
    assert text.endswith("another\n")


def test_what_is_told_is_told_in_every_mode(clock, capsys):
    for mode in ("plain", "off"):
        Progress(mode, clock).tell(mode)
    assert capsys.readouterr().err == "plain\noff\n"


def test_mode(monkeypatch, terminal):
    terminal()
    assert Progress.mode("off") == "off"
    assert Progress.mode("auto") == "bar"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert Progress.mode("auto") == "plain"


def test_leader_is_silent_under_a_supervisor(monkeypatch, capsys):
    monkeypatch.setenv(SUPERVISED_VARIABLE, "1")
    Progress.of_leader("plain").show(BASE)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv(SUPERVISED_VARIABLE)
    Progress.of_leader("plain").show(BASE)
    assert capsys.readouterr().err != ""


def test_counting_in_lines(clock, capsys):
    with counting("packing", clock) as advance:
        for done in range(1, 1021):
            advance(done, 1020)
            clock.now += 1
    every = int(PLAIN_EVERY_S)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"packing: {every + 1}/1,020"
    assert lines[-1] == "packing: 1,020/1,020"
    assert len(lines) == 1019 // every + 1


def test_counting_on_a_terminal(terminal):
    screen = terminal()
    with counting("packing") as advance:
        advance(1000, 4000)
        advance(4000, 4000)
    assert "packing" in screen.getvalue()
    assert "4,000/4,000" in screen.getvalue()


def test_counting_ends_its_bar_with_an_error(terminal):
    screen = terminal()
    with pytest.raises(ShardError), counting("packing"):
        raise ShardError
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
