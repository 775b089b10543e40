"""The run directory: its owner's alone, never half a file, and the first failure stays."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic import locks, rundir
from hpc_elastic.config import build
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.model import Member, Request
from hpc_elastic.places import checkpoint_folder
from hpc_elastic.rundir import Answer, End, Failure, Launch, RankRecord, RunDirectory, Status

LIMIT_S = 20


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def failure(error="it broke", rank=1):
    return Failure(error=error, traceback="Traceback …", member=3, rank=rank, host="node", generation=2, step=17, time=1.5)


def record(member=0, outcome="member", **more):
    return RankRecord(
        member=Member(id=member, pid=100 + member, host="node", slot=member), outcome=outcome, time=1.5, **more
    )


# --- the directory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_all_of_it_is_its_owners_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        run = RunDirectory.create(tmp_path / "above" / "run")
        run.put_status(Status(state="running", time=1.0, started=0.0))
        run.put_record(record())
        run.ask(Request("stop"))
        run.answer(run.ask(Request("resize", 3)), Answer(accepted=True, text="yes"))
        assert run.fail(failure())
        left = [path for path in run.path.rglob("*") if path.is_file()]
    finally:
        os.umask(before)
    folders = [path for path in run.path.rglob("*") if path.is_dir()]
    assert {path.name for path in folders} >= {"inbox", "answers", "ranks"}
    assert {mode(path) for path in (run.path, *folders)} == {0o700}
    assert len(left) == 5
    assert {path.name: mode(path) for path in left} == {path.name: 0o600 for path in left}


def test_an_empty_directory_may_be_there(tmp_path):
    tmp_path.chmod(0o755)
    run = RunDirectory.create(tmp_path)
    assert mode(run.path) == 0o700
    assert RunDirectory(tmp_path).path == run.path


def test_a_used_one_is_refused(run):
    with pytest.raises(RunDirectoryError, match="already used: name another one"):
        RunDirectory.create(run.path)
    assert (run.path / "ranks").is_dir(), "nothing is taken away"


def test_one_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "file" / "above" / "run", Path("/proc/run")):
        with pytest.raises(RunDirectoryError, match=f"{path} can't be made: [A-Z]"):
            RunDirectory.create(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_one_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        RunDirectory.create(tmp_path / "run")


def test_what_is_no_run_directory(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            RunDirectory(path)


def test_names_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _form: "20260102-030405")
    found = [RunDirectory.create_below(tmp_path / "runs", "train").path.name for _ in range(3)]
    assert found == ["train-20260102-030405", "train-20260102-030405-1", "train-20260102-030405-2"]


def test_a_path_does_not_depend_on_where_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunDirectory.create(Path("run"))
    run = RunDirectory(Path("run"))
    monkeypatch.chdir("/")
    run.put_record(record())
    assert run.records() == [record()]


# --- files ----------------------------------------------------------------------------------------------------------------


def test_a_file_comes_by_a_rename(run, monkeypatch):
    """The new content is whole before it gets its name; on the way, nothing looks like a record or a request."""
    run.put_record(record())
    seen = []
    rename = Path.rename

    def spy(self, target):
        seen.append((self.parent == target.parent, self.name.startswith("."), run.get(self, RankRecord)))
        assert run.records() == [record()]
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    run.put_record(record(outcome="ended"))
    assert seen == [(True, True, record(outcome="ended"))]
    assert run.records() == [record(outcome="ended")]


def test_readers_never_see_a_part(run):
    """One writer, and a reader that looks as often as it can."""
    texts = ["", "x" * 50_000]
    statuses = [Status(state="running", time=0.0, started=0.0, under_way=text) for text in texts]
    run.put_status(statuses[0])
    done = threading.Event()

    def write():
        for i in range(200):
            run.put_status(statuses[i % 2])
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    looks = 0
    while not done.is_set():
        assert run.status() in statuses
        looks += 1
    thread.join(LIMIT_S)
    assert looks
    assert [path.name for path in run.path.iterdir() if path.is_file()] == ["status.json"]


def test_variables_that_are_no_utf8_are_written(run):
    variables = {"environ": {"NAME": os.fsdecode(b"Andr\xe9")}}
    run.put(run.path / "order.json", variables)
    assert json.loads((run.path / "order.json").read_bytes()) == variables


def test_what_is_not_there_is_none(run):
    assert run.status() is None
    assert run.record(0) is None
    assert run.records() == []
    assert run.failure() is None
    assert run.answer_to("none.json") is None
    assert run.requests() == []


@pytest.mark.parametrize("damage", [b"", b"{", b'{"state": 1}', b"null", b"\xff\xfe", b'{"state": "\xff"}'])
def test_what_is_damaged_is_said(run, damage):
    (run.path / "status.json").write_bytes(damage)
    with pytest.raises(RunDirectoryError, match=r"status\.json is damaged"):
        run.status()


numbers = st.floats(allow_nan=False, allow_infinity=False)
members = st.builds(Member, st.integers(0, 99), st.integers(1, 9999), st.text(max_size=9), st.integers(-1, 9), st.booleans())


@settings(deadline=None)
@given(
    st.builds(
        Status,
        state=st.sampled_from(["starting", "running", "ended", "stopped", "failed"]),
        time=numbers,
        started=numbers,
        generation=st.integers(0, 99),
        members=st.lists(members, max_size=3).map(tuple),
        metrics=st.dictionaries(st.text(max_size=5), numbers, max_size=3),
        under_way=st.text(max_size=9),
    )
)
def test_a_status_reads_as_it_was_written(tmp_path_factory, status):
    run = RunDirectory.create(tmp_path_factory.mktemp("run"))
    run.put_status(status)
    assert run.status() == status


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_breaks_nothing(run, value):
    """JSON has neither NaN nor infinity, and a job that diverges has its status looked at more than others."""
    run.put_status(Status(state="running", time=1.0, started=0.0, step=5, metrics={"loss": value, "accuracy": 0.5}))
    status = run.status()
    assert status is not None
    assert status.step == 5
    assert status.metrics["accuracy"] == 0.5
    assert status.metrics["loss"] != status.metrics["loss"]


# --- records --------------------------------------------------------------------------------------------------------------


def test_records_are_sorted_by_number(run):
    for member in (10, 2, 0):
        run.put_record(record(member))
    run.put_record(record(2, outcome="failed", error="why", peak_bytes=5))
    assert [found.member.id for found in run.records()] == [0, 2, 10]
    assert run.record(2) == record(2, outcome="failed", error="why", peak_bytes=5)


# --- attempts -----------------------------------------------------------------------------------------------------------


def test_an_attempt_is_put_away(run):
    assert run.attempt() == 1
    run.put_record(record())
    run.beat_file(0).touch()
    run.condemn(3)
    run.ask(Request("resize", 2))
    run.put_status(Status(state="running", time=1.0, started=0.0))
    run.fail(failure())
    assert run.retire_attempt() == 1
    old = run.path / "attempts" / "1"
    assert {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()} == {
        *("ranks/0.json", "ranks/0.beat", "condemned/3", "failure.json"),
    }
    assert (run.records(), run.failed(), run.attempt()) == ([], False, 2)
    assert run.status() is not None
    assert len(run.requests()) == 1
    assert not [path.name for path in run.path.iterdir() if path.name.startswith(".")]
    assert run.retire_attempt() == 2
    assert [path.name for path in run.attempts()] == ["1", "2"]


def test_attempts_are_in_the_order_of_their_numbers(run):
    for number in (10, 9, 2):
        (run.path / "attempts" / str(number)).mkdir(parents=True)
    assert [path.name for path in run.attempts()] == ["2", "9", "10"]
    assert run.retire_attempt() == 11


def test_putting_away_can_be_done_once_more(run):
    """A supervisor that is killed meanwhile leaves half of it."""
    (run.path / "attempts" / "1").mkdir(parents=True)
    (run.path / "ranks").rename(run.path / "attempts" / "1" / "ranks")
    (run.path / ".newcomers").mkdir()
    assert run.retire_attempt() == 2
    assert RunDirectory(run.path).records() == []
    assert not (run.path / ".newcomers").exists()


def test_ends_are_sorted_by_time(run):
    ends = [End(member=n, pid=n, host="a", code=1, signal=0, time=9.0 - n, peak_bytes=0, last_words="") for n in range(3)]
    for end in ends:
        run.put(run.path / "ranks" / f"{end.member}.end.json", end)
    run.put_record(record(1))
    assert run.ends() == ends[::-1]
    assert run.records() == [record(1)]


def test_launch(run):
    assert run.launch() is None
    launch = Launch(script="a.b", module=True, arguments=["-x"], settings={"max": 3}, directory="/d", mpi="MPI")
    run.put_launch(launch)
    assert run.launch() == launch


def test_one_supervisor_at_a_time(run):
    with run.lock():
        with pytest.raises(RunDirectoryError, match="is in use"):
            run.lock()
        assert mode(run.path / "supervisor.lock") == 0o600
    run.lock().close()


def test_a_look_for_the_supervisor_leaves_no_trace(run):
    assert not run.is_supervised()
    assert not (run.path / "supervisor.lock").exists()
    with run.lock():
        assert run.is_supervised()
    assert not run.is_supervised()


def test_whoever_looks_is_not_taken_for_a_supervisor(run):
    """Not even one that looks again and again while another begins."""
    run.lock().close()
    code = """
import pathlib, sys
from hpc_elastic.rundir import RunDirectory
run = RunDirectory(pathlib.Path(sys.argv[1]))
print(flush=True)
while True:
    run.is_supervised()
"""
    with subprocess.Popen([sys.executable, "-c", code, run.path], stdout=subprocess.PIPE) as looker:
        looker.stdout.readline()
        try:
            for _ in range(2000):
                run.lock().close()
        finally:
            looker.kill()


def test_a_file_system_without_locks(run, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    run.lock().close()
    assert run.is_supervised(), "it can't be known"


def test_where_checkpoints_are(run):
    assert checkpoint_folder(build({}), run.path) == run.path / "checkpoints"
    assert checkpoint_folder(build({"checkpoint_dir": "/scratch"}), run.path) == Path("/scratch/run")


def test_an_unused_one_is_removed(run):
    run.put_launch(Launch(script="a", module=False, arguments=[], settings={}, directory="/d", mpi="MPI"))
    run.lock().close()
    run.remove_unused()
    assert not run.path.exists()


# --- failure --------------------------------------------------------------------------------------------------------------


def test_the_first_failure_stays(run):
    assert not run.failed()
    assert run.fail(failure("first"))
    assert run.failed()
    assert not run.fail(failure("second"))
    assert run.failure() == failure("first")
    assert [path.name for path in run.path.iterdir() if path.is_file()] == ["failure.json"]


def test_one_of_many_failures_is_the_first(run):
    """All ranks at once: one is told that it was first, and its failure is the one that is read."""
    ready = threading.Barrier(8, timeout=LIMIT_S)
    first = []

    def one(rank):
        ready.wait()
        if run.fail(failure(rank=rank)):
            first.append(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(first) == 1
    assert run.failure() == failure(rank=first[0])


# --- requests -------------------------------------------------------------------------------------------------------------


def test_requests_come_in_the_order_of_their_asking(run, monkeypatch):
    times = iter([1_700_000_000_000_000_003, 1_700_000_000_000_000_001, 1_700_000_000_000_000_002])
    monkeypatch.setattr(rundir.time, "time_ns", lambda: next(times))
    names = [run.ask(Request("resize", ranks)) for ranks in (3, 1, 2)]
    assert len(set(names)) == 3
    assert [request for _, request in run.requests()] == [Request("resize", ranks) for ranks in (1, 2, 3)]
    assert {name for name, _ in run.requests()} == set(names)


def test_what_killed_processes_leave_is_swept(run):
    """Values half written, wherever they are, and sockets of guards; what is whole stays."""
    meeting = run.path / "losses" / "3"
    meeting.mkdir()
    whole = [run.path / "ranks" / "0.json", meeting / "0.json", meeting / "1.greeted", run.newcomers / "1.parent"]
    rests = [
        run.path / ".status.json.0123abcd",
        run.path / "ranks" / ".0.end.json.4711",
        run.newcomers / ".1.parent.4711",
        meeting / ".0.json.0123abcd",
        meeting / ".verdict.0123456789abcdef",
        meeting / "..verdict.0123456789abcdef.0123abcd",
    ]
    for path in (*whole, *rests):
        path.touch()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(run.newcomers / "1.sock"))
    assert set(run.rests()) == {*rests, run.newcomers / "1.sock"}
    run.sweep()
    assert run.rests() == []
    assert all(path.exists() for path in whole)


def test_a_request_half_written_is_not_seen(run):
    (run.path / "inbox" / ".123.json.abcd").write_text("{")
    assert run.requests() == []


@pytest.mark.parametrize(
    "damage", [b"", b'{"kind": 3}', b'{"kind": "resize", "ranks": "x"}', b"\xff\xfe\x00", b'{"kind": "\xff"}']
)
def test_a_damaged_request_hides_no_other(run, damage):
    (run.path / "inbox" / "0.json").write_bytes(damage)
    name = run.ask(Request("resize", 2))
    assert run.requests() == [("0.json", None), (name, Request("resize", 2))]
    run.answer("0.json", Answer(accepted=False, text="can't be read"))
    assert run.requests() == [(name, Request("resize", 2))]


def test_an_answer_that_finds_no_room_takes_the_request_away(run, monkeypatch):
    """It would be done again and again."""
    name = run.ask(Request("stop"))
    monkeypatch.setattr(rundir, "encoded", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        run.answer(name, Answer(accepted=True, text=""))
    assert run.requests() == []
    assert not list(run.path.rglob(".*"))


def test_an_answer_takes_the_request_away(run):
    name = run.ask(Request("stop"))
    assert run.answer_to(name) is None
    run.answer(name, Answer(accepted=True, text="stops at the next step"))
    assert run.requests() == []
    assert run.answer_to(name) == Answer(accepted=True, text="stops at the next step")
    run.answer(name, Answer(accepted=False, text="too late"))  # asked for once, answered twice: no error


def test_bytes_that_are_no_utf8_come_back(run):
    put = Launch(script="\udce4.py", module=False, arguments=["\udcff"], settings={"a": 1}, directory="/\udc80", mpi="MPICH")
    run.put_launch(put)
    assert run.launch() == put
