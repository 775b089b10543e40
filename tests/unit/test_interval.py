"""When checkpoints begin: what can be lost stays within the interval, whatever writing takes up to half of it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.runtime.interval import Interval


def play(interval, durations, step_s=1.0):
    """Return, for each checkpoint, the steps made from the one before until it was on the disk, and all snapshots' steps."""
    good, lost, snapshots, step = interval.step, [], [], interval.step
    for duration in durations:
        while not interval.due(step, step * step_s):
            step += 1
        interval.began(step, step * step_s)
        snapshots.append(step)
        step += duration
        interval.written(step, step * step_s)
        lost.append(step - good)
        good = snapshots[-1]
    return lost, snapshots


@given(st.integers(2, 100), st.integers(0, 1000), st.data())
def test_no_more_than_the_interval_is_lost(steps, first, data):
    longest = max(0, steps // 2 - 1)
    duration = data.draw(st.integers(0, longest))
    lost, _ = play(Interval(steps, 0.0, first, 0.0), [duration] * 12)
    assert max(lost) <= steps


@given(st.integers(4, 100), st.data())
def test_writing_that_varies(steps, data):
    """A write that is quicker than the slowest of the last ones costs nothing."""
    longest = steps // 2 - 1
    durations = [longest, *data.draw(st.lists(st.integers(longest // 2, longest), max_size=10))]
    lost, _ = play(Interval(steps, 0.0, 0, 0.0), durations)
    assert max(lost) <= steps + longest // 2 + 1
    lost, _ = play(Interval(steps, 0.0, 0, 0.0), [longest, longest - 1, longest] * 3)
    assert max(lost) <= steps


@given(st.integers(2, 100), st.lists(st.integers(0, 300), max_size=12))
def test_never_more_often_than_twice_an_interval(steps, durations):
    _, snapshots = play(Interval(steps, 0.0, 0, 0.0), durations)
    assert all(after - before >= steps // 2 for before, after in itertools.pairwise(snapshots))


@given(st.integers(0, 100), st.integers(0, 1000), st.integers(0, 300), st.none() | st.integers(0, 80))
def test_the_step_at_which_it_is_due(steps, first, later, writing):
    interval = Interval(steps, 0.0, first, 0.0)
    if writing is not None:
        interval.began(first, 0.0)
        interval.written(first + writing, 0.0)
    due = interval.next_step(first + later)
    assert due >= first + later
    for step in range(first + later, first + later + 200):
        assert interval.due(step, 0.0) == (step >= due)


def test_seconds():
    interval = Interval(0, 60.0, 0, 1000.0)
    assert [interval.due(0, at) for at in (1000.0, 1029.0, 1030.0)] == [False, False, True]
    interval.began(0, 1030.0)
    interval.written(5, 1032.0)
    assert [interval.due(9, at) for at in (1087.0, 1088.0)] == [False, True]


def test_none_wanted():
    assert not Interval(0, 0.0, 0, 0.0).due(10**6, 1e9)


def test_a_new_loop_counts_anew():
    interval = Interval(10, 0.0, 95, 0.0)
    assert not interval.due(0, 0.0)
    assert interval.due(5, 0.0)


def test_what_was_written_twice_counts_once():
    """The second word is of a checkpoint that a leader before had begun."""
    interval = Interval(10, 0.0, 0, 0.0)
    interval.began(5, 0.0)
    interval.written(6, 0.0)
    interval.written(60, 0.0)
    assert interval.due(13, 0.0)
