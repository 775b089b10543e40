"""The report: what it makes of runs that ended, run, failed, have just begun, or are damaged."""

from __future__ import annotations

import json

import pytest

from hpc_elastic import events
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.model import Member
from hpc_elastic.report import summarize, table
from hpc_elastic.rundir import Failure, RankRecord, RunDirectory, Status

T = 1_000_000.0
MEMBER = Member(id=0, pid=77, host="a")


def started(**settings):
    return events.Started(time=T, script="train", mpi="MPICH Version:   5", hosts=("a",), ranks=1, settings=settings)


def epoch(number, steps, seconds, when, **others):
    """The end of an epoch; its step is the number of the last one, from 0."""
    values = {"epoch": number, "step": steps - 1, "ranks": 1, "samples": 1000, "seconds": seconds}
    return events.Epoch(time=T + when, metrics={"loss": 1 / (number + 1)}, **{**values, **others})


def grown(step, when, **others):
    values = {
        "generation": 1,
        "epoch": 1,
        "before": 1,
        "after": 3,
        "joined": (1, 2),
        "left": (),
        "reason": "asked",
        "stages": {"drain": 0.1, "merge": 0.4},
        "standstill_s": 0.5,
        "wait_s": 3.0,
        "state_bytes": 64,
        "moved_bytes": 2048,
    }
    return events.Resized(time=T + when, step=step, **{**values, **others})


def shrunk(step, when):
    leaves = {"generation": 2, "before": 3, "after": 2, "joined": (), "left": (0,), "reason": "revoked"}
    return grown(step, when, **leaves, stages={"drain": 0.1, "split": 0.1}, standstill_s=0.2, wait_s=0.0)


def ready(member, host="b"):
    return events.Ready(time=T + 20, member=member, host=host, stages={"spawn": 0.2, "warm": 9.5})


def ended(steps, when, **others):
    return events.Ended(time=T + when, steps=steps, seconds=when, ranks=2, **others)


def status(state, **others):
    return Status(state=state, time=T + others.pop("when", 100), started=T, **others)


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


def write(run, *happened, now=None):
    log = events.EventLog(run.events)
    for event in happened:
        log.write(event)
    if now is not None:
        run.put_status(now)
    summary = summarize(run)
    assert json.loads(json.dumps(summary)) == summary
    return summary


def shown(summary, capsys):
    table(summary)
    out, err = capsys.readouterr()
    assert not err
    return out


WHOLE = (
    started(policy="manual"),
    epoch(0, 10, 10.0, 12),  # the script took 2 s until it trained
    ready(1),
    ready(2),
    grown(15, 17.5),
    epoch(1, 20, 8.0, 20, ranks=3),
    shrunk(25, 22.7),
    epoch(2, 30, 8.0, 27, ranks=2),
    ended(30, 40),
)


def test_ended_run(run, capsys):
    run.put_record(RankRecord(member=MEMBER, outcome="retired", time=T, peak_bytes=5))
    now = status("ended", when=40, ranks=2, step=30, steps=30, metrics={"loss": 0.25})
    summary = write(run, *WHOLE, now=now)
    assert summary["state"] == "ended"
    assert summary["script"] == "train"
    assert summary["mpi"] == "MPICH Version: 5"
    assert summary["hosts"] == ["a", "b"]
    assert (summary["steps"], summary["steps_planned"], summary["epochs"]) == (30, 30, 3)
    assert (summary["seconds"], summary["ranks"], summary["unit"]) == (40.0, 2, "samples")
    assert summary["metrics"] == {"loss": 0.25}
    assert summary["failure"] is None
    assert summary["processes"] == [
        {"id": 0, "pid": 77, "host": "a", "slot": -1, "parks": False, "outcome": "retired", "peak_bytes": 5}
    ]
    out = shown(summary, capsys)
    for text in ("ended after 40.0 s", "loss 0.25", "policy = manual", "500.0 ms", "merge", "400.0", "9.50", "2.0 kB"):
        assert text in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_generations(run):
    first, second, third = write(run, *WHOLE)["generations"]
    assert [row["number"] for row in (first, second, third)] == [0, 1, 2]
    assert [(row["from_step"], row["to_step"], row["steps"]) for row in (first, second, third)] == [
        (0, 15, 15),
        (15, 25, 10),
        (25, 30, 5),
    ]
    assert (first["joined"], first["left"], first["reason"]) == ([0], [], "start")
    assert (second["joined"], second["left"], second["reason"]) == ([1, 2], [], "asked")
    assert (third["joined"], third["left"], third["reason"]) == ([], [0], "revoked")
    assert second["stages"] == {"drain": 0.1, "merge": 0.4}
    assert (second["wait_s"], second["moved_bytes"]) == (3.0, 2048)
    # From the first epoch's begin, at 2 s, to the standstill, at 17 s; 100 samples a step.
    assert first["steps_per_s"] == pytest.approx(15 / 15)
    assert first["samples_per_s"] == pytest.approx(100)
    # From the resize, at 17.5 s, to the next standstill, at 22.5 s.
    assert second["steps_per_s"] == pytest.approx(10 / 5)
    assert second["samples_per_s"] == pytest.approx(200)
    # To the last step, at 27 s: what the script did afterwards is not training.
    assert third["steps_per_s"] == pytest.approx(5 / 4.3)


def test_hold_is_no_pace(run):
    """With hold the members stand still while newcomers warm up; a generation's pace leaves that out."""
    first, _ = write(run, started(hold=True), grown(10, 8.5, wait_s=3.0))["generations"]
    assert first["seconds"] == pytest.approx(5)
    assert first["steps_per_s"] == pytest.approx(2)


def test_turns(run, capsys):
    summary = write(run, started(), epoch(0, 50, 10.0, 10, samples=50), ended(50, 10))
    assert summary["unit"] == "turns"
    assert summary["generations"][0]["steps_per_s"] == pytest.approx(5)
    assert "turns/s" in shown(summary, capsys)


def test_two_loops(run):
    """A second loop of the same script counts its steps from 0 again."""
    summary = write(run, started(), epoch(0, 10, 5.0, 5), grown(4, 8), epoch(0, 6, 4.0, 10, samples=600), ended(6, 10))
    assert [row["steps"] for row in summary["generations"]] == [14, 2]
    assert summary["steps"] == 16


def test_just_started(run, capsys):
    summary = write(run)
    assert summary["state"] == "starting"
    assert summary["generations"] == []
    assert summary["seconds"] is None
    assert "starting" in shown(summary, capsys)


def test_running(run, capsys):
    now = status("running", when=10, ranks=1, step=20, steps=80, under_way="1 -> 3 ranks")
    summary = write(run, started(), now=now)
    (row,) = summary["generations"]
    assert row["to_step"] == 20
    assert row["steps_per_s"] == pytest.approx(2)
    assert row["samples_per_s"] is None
    out = shown(summary, capsys)
    assert "running, 1 -> 3 ranks" in out
    assert "20 of 80" in out
    assert "steps/s" in out


def test_failed(run, capsys):
    """A job killed from outside leaves "running" in its status; the failure is what counts."""
    trace = "Traceback [bold]\nValueError: no"
    failure = Failure(error="rank 1 raised", traceback=trace, member=1, rank=1, host="a", generation=0, step=4)
    assert run.fail(failure)
    crash = events.Failed(time=T + 5, error="rank 1 raised", rank=1, host="a", generation=0, step=4)
    summary = write(run, started(), crash, now=status("running", when=6, step=2, steps=9, under_way="1 -> 2 ranks"))
    assert summary["steps"] == 4
    assert summary["state"] == "failed"
    assert summary["under_way"] == ""
    assert summary["failure"]["step"] == 4
    out = shown(summary, capsys)
    assert "failed: rank 1 raised" in out
    assert trace in out


def test_failed_before_it_began(run, capsys):
    assert run.fail(Failure(error="no MPI", traceback="", member=0, rank=-1, host="a", generation=-1, step=-1))
    summary = write(run)
    assert summary["state"] == "failed"
    assert shown(summary, capsys).splitlines()[-1] == "failed: no MPI"


def test_refusals_and_notices(run, capsys):
    refused = events.Refused(time=T + 3, step=7, ranks=9, reason="only 2 cores")
    twin = events.Notice(time=T + 3, text="resize to 9 ranks given up at step 7: only 2 cores")
    summary = write(run, started(), refused, twin, events.Notice(time=T + 4, text="ranks sleep"))
    assert summary["refusals"] == [{"time": T + 3, "step": 7, "ranks": 9, "reason": "only 2 cores"}]
    out = shown(summary, capsys)
    assert out.count("only 2 cores") == 1
    assert "step 7" in out
    assert "notice: ranks sleep" in out


def test_half_a_line_is_left_out(run):
    write(run, started())
    with run.events.open("ab") as file:
        file.write(b'{"event":"ended","ti')
    assert summarize(run)["script"] == "train"


@pytest.mark.parametrize("line", [b"garbage", b'{"event":"unheard"}', b'{"event":"refused"}', b"\xff\xfe", b""])
def test_damaged_events(run, line):
    write(run, started())
    with run.events.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunDirectoryError, match=r"events\.jsonl is damaged, line 2 is not an event.*remove that line"):
        summarize(run)


def test_damaged_status(run):
    (run.path / "status.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"status\.json is damaged"):
        summarize(run)
