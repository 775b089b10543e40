"""The guard, as the process that it is."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpc_elastic
from hpc_elastic.rundir import Failure, RunDirectory

PACKAGE = Path(hpc_elastic.__file__).parent
PYTHON = [sys.executable, "-I", "-S"]
LIMIT_S = 30


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


def guard(run, *command):
    return [*PYTHON, str(PACKAGE / "guard.py"), str(run.path), "7", *command]


def shell(text):
    return "/bin/sh", "-c", text


def done(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, **options)


def files(run):
    return [str(path.relative_to(run.path)) for path in run.path.rglob("*") if not path.is_dir()]


def until(condition):
    """Wait until ``condition()`` holds, for real processes, which tell nobody how far they are."""
    limit = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.005)


def catches(pid, number):
    """Tell whether the process has a handler for the signal `number`."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


# --- the guard ------------------------------------------------------------------------------------------------------------


def test_a_good_end_leaves_nothing(run):
    ended = done(guard(run, *shell("echo out; echo err >&2")))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "out\n", "err\n")
    assert not run.failed()
    assert files(run) == []


@pytest.mark.parametrize("code", [1, 3, 127, 255])
def test_an_exit_code_is_passed_on_and_recorded(run, code):
    assert done(guard(run, *shell(f"exit {code}"))).returncode == code
    failure = run.failure()
    assert failure is not None
    assert failure.member == 7
    assert failure.host == os.uname().nodename
    assert failure.error.startswith("process 7 (pid ")
    assert failure.error.endswith(f" on {failure.host}) ended with exit code {code}")
    assert files(run) == ["failure.json"]
    assert stat.S_IMODE((run.path / "failure.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "was killed by signal 9 (SIGKILL)"),
        (signal.SIGSEGV, "was killed by signal 11 (SIGSEGV)"),
        (signal.SIGTERM, "was killed by signal 15 (SIGTERM)"),
        (signal.SIGRTMIN + 6, "was killed by signal 40 (real-time)"),
    ],
)
def test_a_death_by_signal_is_recorded(run, number, how):
    ended = done(guard(run, *shell(f"ulimit -c 0; echo $$; kill -{int(number)} $$")))
    assert ended.returncode == 128 + number
    failure = run.failure()
    assert failure is not None
    assert failure.error == f"process 7 (pid {ended.stdout.strip()} on {os.uname().nodename}) {how}"


def test_a_command_that_is_not_there(run):
    ended = done(guard(run, "/nowhere/python", "x"))
    assert ended.returncode == 127
    assert "/nowhere/python: No such file or directory" in ended.stderr
    assert run.failed()


def test_the_first_failure_is_kept(run):
    first = Failure(error="ValueError", traceback="…", member=2, rank=1, host="node", generation=3, step=9)
    assert run.fail(first)
    assert done(guard(run, *shell("exit 5"))).returncode == 5
    assert run.failure() == first
    assert files(run) == ["failure.json"]


def test_a_run_directory_that_is_gone_is_said(run, tmp_path):
    run.path.rename(tmp_path / "elsewhere")
    ended = done(guard(run, *shell("exit 5")))
    assert ended.returncode == 5
    assert "ended with exit code 5; could not be recorded" in ended.stderr


# Not a shell: it can't trap what its parent ignored, as processes in the background ignore SIGINT and SIGQUIT.
TRAP = """
import os, signal
def hear(number, frame):
    os.write(1, b"heard")
    os._exit(9)
signal.signal({number}, hear)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
)
def test_signals_are_passed_to_the_rank(run, number):
    """The rank hears of it, and the guard ends as the rank does."""
    command = guard(run, *PYTHON, "-c", TRAP.format(number=number.value))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            until(lambda: catches(process.pid, number))
            process.send_signal(number)
            out, _ = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert out == "heard"
    assert process.returncode == 9


def test_a_signal_that_kills_the_rank_ends_the_guard(run):
    with subprocess.Popen(
        guard(run, *shell("echo ready; exec sleep 1000")), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            until(lambda: catches(process.pid, signal.SIGTERM))
            process.terminate()
            assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "SIGTERM" in run.failure().error


@pytest.mark.parametrize(
    ("end", "said"), [("exit 0", b""), ("exit 1", b"cmd=finalize\n"), ("kill -9 $$", b"cmd=finalize\n")]
)
def test_the_pmi_session_of_a_dead_rank_is_closed(run, end, said):
    """A rank that ends well has closed it itself."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.sendall(b"cmd=finalize_ack\n")
            done(guard(run, *shell(end)), pass_fds=[theirs.fileno()], env={**os.environ, "PMI_FD": str(theirs.fileno())})
        assert heard(ours) == said


def heard(connection):
    """Return all that comes until the other end is closed."""
    connection.settimeout(LIMIT_S)
    found = b""
    try:
        while part := connection.recv(100):
            found += part
    except ConnectionResetError:  # the other end was closed with an acknowledgement unread
        pass
    return found


def test_the_death_of_a_launcher_that_is_gone_is_recorded(run):
    """The other end of the PMI session is closed: the guard records the death all the same."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        ended = done(
            guard(run, *shell("exit 4")), pass_fds=[theirs.fileno()], env={**os.environ, "PMI_FD": str(theirs.fileno())}
        )
    assert ended.returncode == 4
    assert run.failed()


# --- the guard of a newcomer ----------------------------------------------------------------------------------------------


def warm(run, path, *command):
    return [*PYTHON, str(PACKAGE / "guard.py"), "--warm", str(path), str(run.path), "7", *command]


def test_a_newcomer_that_dies_before_it_is_wanted_fails_no_job(run, tmp_path):
    assert done(warm(run, tmp_path / "door", *shell("exit 6"))).returncode == 6
    assert files(run) == []
    assert not (tmp_path / "door").exists()


def test_a_newcomer_that_cannot_be_started_fails_no_job(run, tmp_path):
    ended = done(warm(run, tmp_path / "door", "/nowhere/python"))
    assert ended.returncode == 127
    assert "/nowhere/python" in ended.stderr
    assert files(run) == []


RANK = """
import os, socket
door = socket.socket(fileno=int(os.environ["HPC_ELASTIC_DOOR"]))
data, (session,), _, _ = socket.recv_fds(door, 1 << 18, 1)
os.write(session, b"rank " + data)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("", 0, b"rank gifts"),
        ("os._exit(3)", 3, b"rank giftscmd=finalize\n"),
        ("os.kill(os.getpid(), 9)", 137, b"rank giftscmd=finalize\n"),
    ],
)
def test_what_the_launcher_gave_is_handed_on(run, tmp_path, end, code, said):
    """The rank gets data and descriptor; whoever brought them hears how it ended, and a death counts from now on."""
    folder = tmp_path / ("long" * 40)  # more than a socket's name may have
    folder.mkdir()
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen(warm(run, folder / "door", sys.executable, "-c", RANK.format(end=end))) as process:
        try:
            caller = connect(folder / "door")
            with caller, theirs:
                ours.sendall(b"cmd=finalize_ack\n")
                socket.send_fds(caller, [b"gifts"], [theirs.fileno()])
                theirs.close()
                caller.settimeout(LIMIT_S)
                assert caller.recv(10) == bytes([code])
            assert process.wait(LIMIT_S) == code
        finally:
            process.kill()
        assert heard(ours) == said
    assert files(run) == (["failure.json"] if code else [])
    assert not (folder / "door").exists()


def connect(path):
    """Return a connection to the socket at `path`, as soon as somebody listens."""
    until(path.exists)
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until(lambda: caller.connect_ex(f"/proc/self/fd/{folder}/{path.name}") == 0)
    finally:
        os.close(folder)
    return caller
