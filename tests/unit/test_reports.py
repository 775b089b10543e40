"""What the leader reports: of those that are lost, as soon as their guards have said how; and while the disk is full."""

from __future__ import annotations

import os
import subprocess

import pytest

from hpc_elastic import events, leftovers, processes
from hpc_elastic.model import Member
from hpc_elastic.rundir import End, RunDirectory
from hpc_elastic.runtime.plan import Tally
from hpc_elastic.runtime.reports import LATE_S, RECORDED_S, Log, await_ends
from tests.launch import until


def test_events_are_left_out_while_the_disk_is_full(tmp_path, capfd, monkeypatch):
    """Whole ones, and it is said once each time; other troubles are raised."""
    log, usual, room = Log(tmp_path / "events.jsonl"), os.write, 10
    monkeypatch.setattr(os, "write", lambda file, data: usual(file, data[:room]) if file > 2 else usual(file, data))
    for _ in range(2):
        log.write(events.Notice(text="a"))
    room = 1000
    log.write(events.Notice(text="b"))
    monkeypatch.setattr(os, "write", usual)
    assert [event.text for event in events.read(tmp_path / "events.jsonl")] == ["b"]
    assert capfd.readouterr().err.count("the run directory is not written until there is room: No space left on device") == 1
    with pytest.raises(FileNotFoundError):
        Log(tmp_path / "gone" / "events.jsonl").write(events.Notice(text="c"))


@pytest.mark.parametrize("recorded", [True, False])
def test_the_records_of_the_lost_are_awaited(recorded, tmp_path):
    """But not for long."""
    run = RunDirectory.create(tmp_path / "run")
    now, members = 0.0, tuple(Member(number, 100 + number, "here") for number in range(2))

    def pause(seconds):
        nonlocal now
        number = round(now / seconds)
        now += seconds
        if number < 2 and recorded:
            end = End(member=number, pid=1, host="here", code=137, signal=9, time=0.0, peak_bytes=0, last_words="")
            run.put(run.path / "ranks" / f"{number}.end.json", end)

    await_ends(run, members, lambda: now, pause)
    assert (len(run.ends()), now >= RECORDED_S) == ((2, False) if recorded else (0, True))


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("at_s", [2 * RECORDED_S, 2 * LATE_S])
def test_a_guard_that_is_late_is_waited_for(at_s, here, tmp_path):
    """Longer than one that may be gone, as its host may be: of whom it has not taken note is a zombie."""
    run, now = RunDirectory.create(tmp_path / "run"), 0.0

    def pause(seconds):
        nonlocal now
        now += seconds
        if now >= at_s:
            end = End(member=0, pid=1, host="here", code=137, signal=9, time=0.0, peak_bytes=0, last_words="")
            run.put(run.path / "ranks" / "0.end.json", end)

    with subprocess.Popen(["true"]) as lost:
        until(lambda: processes.is_zombie(lost.pid))
        await_ends(run, [Member(0, lost.pid, leftovers.HOST if here else "elsewhere")], lambda: now, pause)
        assert now == pytest.approx(min(at_s, LATE_S) if here else RECORDED_S, abs=0.01)
        assert (run.end_of(0) is not None) == (here and at_s < LATE_S)
        lost.wait()
        begun = now
        await_ends(run, [Member(1, lost.pid, leftovers.HOST)], lambda: now, pause)
        assert now - begun == pytest.approx(RECORDED_S, abs=0.01)


def test_an_epoch_does_not_last_while_the_job_does_not_run():
    """Its seconds, and the rate, are those of the parts before and after."""
    tally = Tally(began=1000.0).plus(60, {"loss": 2.0})
    resumed = tally.resumed(taken=1030.0, now=90_000.0)
    assert resumed.began == 89_970.0
    assert (resumed.samples, resumed.means(), resumed.recent) == (60, {"loss": 2.0}, tally.recent)
