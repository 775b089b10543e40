"""Who lives, with real processes: ends are seen at once, stalls after a while, and both only of those watched."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from hpc_elastic.comm.liveness import DEAF_LOOKS, DEAF_S, Beats, Deaf, Liveness
from hpc_elastic.model import Member
from hpc_elastic.rundir import End, RankRecord, RunDirectory

HOST = socket.gethostname()
LIMIT_S = 20.0


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


@pytest.fixture
def sleepers():
    """Start processes that sleep; they are ended at the end."""
    started = []

    def start(number):
        started.append(subprocess.Popen(["sleep", "100"]))
        return Member(number, started[-1].pid, HOST)

    yield start
    for process in started:
        process.kill()
        process.wait()


def until(condition):
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.005)


def descriptors():
    gc.collect()  # what other tests have left to it has descriptors, too
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def record(run, member, outcome):
    run.put_record(RankRecord(member=member, outcome=outcome, time=0.0))


def test_an_end_is_seen(run, sleepers):
    members = [sleepers(number) for number in range(3)]
    liveness = Liveness(run, 30.0)
    liveness.watch(members)
    assert liveness.lost() == frozenset()
    os.kill(members[1].pid, signal.SIGKILL)
    until(lambda: liveness.lost() == {1})
    liveness.watch([members[0], members[2]])
    assert liveness.lost() == frozenset()
    liveness.close()


@pytest.mark.parametrize("outcome", ["retired", "parked", "cancelled", "ended"])
def test_who_left_is_not_lost(outcome, run, sleepers):
    member = sleepers(4)
    liveness = Liveness(run, 30.0)
    liveness.watch([member])
    record(run, member, outcome)
    os.kill(member.pid, signal.SIGKILL)
    until(lambda: liveness.gone() == {4})
    assert liveness.lost() == frozenset()
    liveness.close()


def test_who_failed_is_lost(run, sleepers):
    member = sleepers(4)
    liveness = Liveness(run, 30.0)
    liveness.watch([member])
    record(run, member, "failed")
    os.kill(member.pid, signal.SIGKILL)
    until(lambda: liveness.lost() == {4})
    liveness.close()


def test_gone_before_it_was_watched(run):
    process = subprocess.Popen(["true"])
    process.wait()
    liveness = Liveness(run, 30.0)
    liveness.watch([Member(1, process.pid, HOST)])
    assert liveness.gone() == {1}
    assert liveness.among([Member(2, process.pid, HOST)]) == {2}


def test_itself_is_not_watched(run):
    liveness = Liveness(run, 30.0)
    liveness.watch([Member(0, os.getpid(), HOST)])
    assert liveness.gone() == frozenset()


def test_a_stalled_process_is_killed(run, sleepers):
    """It gave a sign of life, and no other one for `stall_s`; its guard is told as well."""
    member = sleepers(7)
    os.kill(member.pid, signal.SIGSTOP)
    run.beat_file(7).touch()
    liveness = Liveness(run, 1.0)
    liveness.watch([member])
    until(lambda: liveness.lost() == {7})
    assert (run.path / "condemned" / "7").exists()
    liveness.close()


def test_another_rank_kills_it_at_that_moment(run, sleepers, monkeypatch):
    member = sleepers(7)
    run.beat_file(7).touch()
    liveness = Liveness(run, 1.0)
    liveness.watch([member])

    def condemned(_):
        os.kill(member.pid, signal.SIGKILL)
        os.waitpid(member.pid, 0)

    monkeypatch.setattr(run, "condemn", condemned)
    until(lambda: liveness.lost() == {7})
    liveness.close()


def test_another_host_is_judged_by_its_guard(run):
    away = Member(3, os.getpid(), "elsewhere")
    liveness = Liveness(run, 30.0)
    liveness.watch([away])
    assert liveness.gone() == frozenset()
    end = End(member=3, pid=1, host="elsewhere", code=137, signal=9, time=0.0, peak_bytes=0, last_words="")
    run.put(run.path / "ranks" / "3.end.json", end)
    until(lambda: liveness.lost() == {3})
    liveness.close()


def test_descriptors_are_closed(run, sleepers):
    before = descriptors()
    liveness = Liveness(run, 30.0)
    for _ in range(3):
        liveness.watch([sleepers(number) for number in range(3)])
    liveness.close()
    assert descriptors() == before


def test_beats(run):
    beats = Beats(run, 0.05)
    assert not beats.stalled(1)  # no sign of life yet: it may still be importing
    run.beat_file(1).touch()
    assert not beats.stalled(1)
    time.sleep(0.06)
    assert beats.stalled(1)
    os.utime(run.beat_file(1))
    assert not beats.stalled(1)


# --- who hears nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("looks", [DEAF_LOOKS // 2, 2 * DEAF_LOOKS])
def test_deaf_is_who_looks_often_in_vain_for_what_was_sent(sent, heard, looks):
    now = 0.0
    deaf = Deaf(lambda: sent, lambda: now)
    found = False
    for _ in range(looks):
        found = deaf(heard=heard)
        now += 2 * DEAF_S / looks
    assert found == (sent and not heard and looks > DEAF_LOOKS)


def test_the_time_counts_from_when_it_was_sent():
    now, sent = 0.0, False
    deaf = Deaf(lambda: sent, lambda: now)
    for _ in range(4 * DEAF_LOOKS):
        now += DEAF_S / DEAF_LOOKS
        assert not deaf(heard=False)
    sent = True
    assert not deaf(heard=False)
    while not deaf(heard=False):
        now += DEAF_S / DEAF_LOOKS
        assert now < 6 * DEAF_S
    assert now > 5 * DEAF_S


def test_a_host_that_does_not_answer(run):
    """Who has been silent for some seconds is named, and is lost once its host is known to be."""
    away = Member(1, 1, "another-host")
    liveness = Liveness(run, 60.0)
    liveness.watch([away])
    run.beat_file(1).touch()
    liveness.gone()
    assert not liveness.silent()
    until(lambda: not liveness.gone() and liveness.silent() == [away])
    liveness.give_up([away])
    assert liveness.lost() == {1}
    assert not liveness.silent()
    assert (run.path / "condemned" / "1").exists()
    liveness.watch(())
    assert not liveness.gone()
