"""The report: what it makes of runs that ended, run, failed, have just begun, or are damaged."""

from __future__ import annotations

import json

import pytest

from hpc_elastic import events
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.model import Member
from hpc_elastic.report import table
from hpc_elastic.rundir import Failure, RankRecord, RunDirectory, Status
from hpc_elastic.summary import summarize

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


# --- losses, restarts, checkpoints ------------------------------------------------------------------------------------


def lost(step, when, **others):
    values = {"generation": 2, "members": (2,), "how": "process 2 was killed by signal 9", "before": 3, "after": 2}
    seconds = {"detect": 0.05, "agree": 0.01, "rebuild": 0.04}
    return events.Lost(time=T + when, step=step, lost_steps=1, seconds=seconds, recovery_s=0.1, **{**values, **others})


def restarted(step, when, attempt=2):
    return events.Restarted(time=T + when, attempt=attempt, step=step, reason="node b is gone", wait_s=0.0)


def again(when, **settings):
    return events.Started(time=T + when, script="train", mpi="MPICH 5", hosts=("c",), ranks=1, settings=settings)


def resumed(step, when, loop=1):
    return events.Resumed(time=T + when, loop=loop, step=step, path="r/x", ranks=1)


def saved(step, when, seconds=1.0, **others):
    values = {"loop": 1, "path": "r/x", "bytes": 2_000_000, "standstill_s": 0.01}
    return events.Checkpointed(time=T + when, step=step, seconds=seconds, **{**values, **others})


def test_loss(run, capsys):
    """A loss makes a generation, and what it cost is not counted as training."""
    summary = write(run, started(), grown(10, 10.5), lost(30, 20.6), ended(50, 31))
    first, second, third = summary["generations"]
    assert (first["to_step"], second["to_step"], third["to_step"]) == (10, 30, 50)
    assert (third["number"], third["ranks"], third["left"]) == (2, 2, [2])
    assert third["reason"] == "process 2 was killed by signal 9"
    assert second["steps_per_s"] == pytest.approx(20 / 10)
    assert third["steps_per_s"] == pytest.approx(20 / 10.4)
    assert summary["losses"][0]["members"] == [2]
    assert (summary["steps"], summary["steps_lost"], summary["attempts"]) == (50, 0, 1)
    out = shown(summary, capsys)
    assert (
        "lost at step 30: process 2: process 2 was killed by signal 9: 3 -> 2 ranks, 1 step done again, "
        "recovered in 100 ms (ms: detect 50, agree 10, rebuild 40)"
    ) in out


def test_rewind(run, capsys):
    """What was done before the place that the job went back to counts, and the rest is lost."""
    back = events.Rewound(time=T + 21, loop=1, step=20, before=30, source="memory", seconds=0.012, ranks=2)
    done = (started(), epoch(0, 10, 10.0, 10), epoch(1, 20, 10.0, 15), grown(25, 17), epoch(2, 30, 10.0, 20))
    summary = write(run, *done, lost(30, 20.6), back, epoch(2, 30, 5.0, 26), ended(50, 31))
    assert (summary["steps"], summary["steps_lost"], summary["epochs"]) == (50, 10, 3)
    assert [each["step"] for each in summary["rewinds"]] == [20]
    assert "rewound from step 30 to step 20, from memory, by 2 ranks in 12 ms" in shown(summary, capsys)


TWICE = (
    started(policy="manual"),
    epoch(0, 10, 10.0, 10),
    saved(10, 10, seconds=1.0),
    epoch(1, 20, 10.0, 20),
    saved(20, 20, seconds=3.0),
    epoch(2, 30, 10.0, 30),
    restarted(34, 40),
    again(41, max=3),
    resumed(20, 42),
    epoch(2, 30, 5.0, 47),
    epoch(3, 40, 5.0, 52),
    ended(40, 12),
)


def test_restart(run, capsys):
    """What was lost and done once more counts once."""
    now = status("ended", when=53, step=40, steps=40)
    summary = write(run, *TWICE, now=now)
    assert (summary["steps"], summary["steps_lost"], summary["epochs"]) == (40, 14, 4)
    assert (summary["attempts"], summary["state"], summary["settings"]) == (2, "ended", {"max": 3})
    assert summary["seconds"] == pytest.approx(52), "from the first start on"
    assert summary["hosts"] == ["a", "c"]
    first, second = summary["generations"]
    assert [(row["attempt"], row["number"], row["from_step"], row["to_step"], row["steps"]) for row in (first, second)] == [
        (1, 0, 0, 34, 34),
        (2, 0, 20, 40, 20),
    ]
    assert second["reason"] == "checkpoint of step 20"
    assert second["steps_per_s"] == pytest.approx(20 / 10)
    assert second["samples_per_s"] == pytest.approx(200)
    assert summary["restarts"] == [{"time": T + 40, "attempt": 2, "step": 34, "reason": "node b is gone", "wait_s": 0.0}]
    assert summary["resumes"][0]["step"] == 20
    found = summary["checkpoints"]
    assert (found["count"], found["seconds"], found["last"]["step"], found["errors"]) == (2, 2.0, 20, [])
    out = shown(summary, capsys)
    for text in (
        "restart (attempt 2) after step 34: node b is gone",
        "40, and 14 lost",
        "2 of 2.0 MB in 2.00 s each, standstill 10.0 ms; last: step 20",
        "1:0",
        "2:0",
    ):
        assert text in out


def test_restart_from_the_beginning(run):
    summary = write(
        run, started(), epoch(0, 10, 10.0, 10), restarted(14, 15), again(16), epoch(0, 10, 5.0, 21), ended(10, 5)
    )
    assert (summary["steps"], summary["steps_lost"], summary["epochs"]) == (10, 14, 1)


def test_restart_that_comes_to_nothing(run):
    """An attempt that failed before it had a checkpoint loaded takes nothing away from those before."""
    began = (started(), epoch(0, 10, 5.0, 5), epoch(0, 4, 2.0, 7, samples=400), restarted(6, 8))
    summary = write(run, *began, again(9), restarted(-1, 10, attempt=3), again(11), resumed(3, 12, loop=2), ended(8, 5))
    assert (summary["steps"], summary["attempts"]) == (18, 3)
    assert summary["epochs"] == 1


def test_between_two_attempts(run):
    """The status has the old step still, which is none of the new attempt's."""
    now = status("starting", when=60, step=34, steps=40, under_way="restart 1 of 5")
    summary = write(run, *TWICE[:8], now=now)
    assert [row["steps"] for row in summary["generations"]] == [34, 0]
    assert summary["state"] == "starting"


def test_a_run_that_was_stopped_goes_on(run):
    """That an earlier attempt ended is no end of the run."""
    stopped = events.Ended(time=T + 5, steps=10, seconds=5.0, ranks=7, stopped=True)
    now = status("running", when=25, ranks=1, step=14, steps=40)
    summary = write(run, started(), stopped, again(20), resumed(10, 21), now=now)
    assert (summary["ranks"], summary["steps"], summary["steps_lost"]) == (1, 14, 0)
    assert summary["seconds"] > 1000, "it runs"


def test_checkpoints_that_failed(run, capsys):
    summary = write(run, started(), saved(10, 3, error="No space left on device"))
    found = summary["checkpoints"]
    assert (found["count"], found["seconds"], found["last"]) == (0, None, None)
    assert found["errors"] == [{"time": T + 3, "step": 10, "error": "No space left on device"}]
    assert "checkpoint failed at step 10: No space left on device" in shown(summary, capsys)


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
