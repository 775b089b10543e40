"""Who keeps a warm parent: when one is started, and when not; the parent is another program, and time is set by hand."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hpc_elastic import adoption, keeper
from hpc_elastic.rundir import RunDirectory
from hpc_elastic.runtime.warming import Warming

LOCKED = (
    "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(99)"
)


@pytest.fixture
def now(monkeypatch):
    class Clock:
        at = 1000.0

    monkeypatch.setattr(keeper.time, "monotonic", lambda: Clock.at)
    return Clock


@pytest.fixture
def kept(tmp_path, now):  # noqa: ARG001  (the clock is set)
    (tmp_path / "warm").mkdir()
    specify(tmp_path)
    found = keeper.Keeper(str(tmp_path))
    yield found
    for process in found.started:
        process.kill()
        process.wait()


def specify(run, *command):
    content = {"command": command or ["/bin/true"], "environ": dict(os.environ)}
    (run / "warm" / "spec.json").write_text(json.dumps(content))


def held(found):
    """Have somebody hold the lock."""
    descriptor = os.open(found.file("lock"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_starts_one_where_none_is_and_pauses_grow(kept, now):
    begun = []
    for _ in range(400):
        if kept.due():
            assert kept.start() == ""
            begun.append(now.at - 1000)
            kept.started[-1].wait()
        now.at += 1
    assert begun == [0, 5, 15, 35, 75]


def test_leaves_alone_the_one_that_is_there(kept, now):
    descriptor = held(kept)
    for _ in range(100):
        assert not kept.due()
        now.at += 1
    os.close(descriptor)
    assert kept.due()


def test_one_that_listened_for_a_while_was_a_success(kept, now):
    kept.tries, kept.back_off_s = 0, 160.0
    descriptor = held(kept)
    for _ in range(60):  # it imports
        assert not kept.due()
        now.at += 1
    assert kept.tries == 0
    open(kept.file("sock"), "w").close()
    for _ in range(int(keeper.STEADY_S) + 2):
        assert not kept.due()
        now.at += 1
    os.close(descriptor)
    assert kept.due()
    assert (kept.tries, kept.back_off_s) == (keeper.TRIES, keeper.BACK_OFF_S)


def test_what_can_not_serve_is_not_tried_again(kept, now, tmp_path):
    """Until something else is to be imported; and guards know why."""
    time.sleep(0.01)  # the files' clock is coarse
    with open(kept.file("refused"), "w") as file:
        file.write("it has 3 threads")
    for _ in range(100):
        assert not kept.due()
        now.at += 1
    assert adoption.unready(str(tmp_path / "warm" / kept.host)) == "it has 3 threads"
    time.sleep(0.01)
    specify(tmp_path)
    assert kept.due()


def test_says_why_none_can_be_started(kept, tmp_path):
    specify(tmp_path, "/no/such/program")
    assert kept.start() == "no warm parent: [Errno 2] No such file or directory: '/no/such/program'"
    (tmp_path / "warm" / "spec.json").write_text("{}")
    assert kept.start() == "no warm parent: 'command'"


def test_ends_those_that_it_has_started(kept, tmp_path):
    """Also a stale one that has lost its lock, beside the next one."""
    specify(tmp_path, sys.executable, "-c", "import time; time.sleep(99)")
    kept.start()
    kept.start()
    kept.end()
    assert [process.wait() for process in kept.started] == [-15, -15]


def test_a_look_at_the_lock_lasts_no_longer(kept):
    """Whoever comes then can have it."""
    open(kept.file("lock"), "w").close()
    assert kept.due()
    with subprocess.Popen([sys.executable, "-c", LOCKED, kept.file("lock")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert kept.there()
        other.kill()


@pytest.mark.parametrize("damage", ["null", "{", ""])
def test_what_to_start_is_damaged(kept, tmp_path, damage):
    (tmp_path / "warm" / "spec.json").write_text(damage)
    assert kept.due()
    assert kept.start().startswith("no warm parent: ")


def test_a_file_is_in_the_place_of_its_folder(kept, tmp_path):
    shutil.rmtree(tmp_path / "warm")
    (tmp_path / "warm").touch()
    assert kept.due()
    assert kept.start().startswith("no warm parent: ")


def test_a_job_goes_on_where_its_folder_is_gone(tmp_path):
    run, said = RunDirectory.create(tmp_path / "run"), []
    shutil.rmtree(run.path / "warm")
    session = SimpleNamespace(run=run, config=SimpleNamespace(warm="on"), script=SimpleNamespace(path=sys.path))
    office, world = SimpleNamespace(max_ranks=2), SimpleNamespace(size=1)
    Warming(SimpleNamespace(session=session, office=office, world=world, reports=SimpleNamespace(say=said.append))).look()
    assert said[0].startswith("no warm parent: ")
