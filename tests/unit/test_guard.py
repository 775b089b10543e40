"""The guard, and what hands over to it, as the processes that they are."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import hpc_elastic
from hpc_elastic import limits
from hpc_elastic.guard import Guard
from hpc_elastic.model import Member
from hpc_elastic.rundir import Failure, RankRecord, RunDirectory
from hpc_elastic.warmth import unpacked

from ..other_user import as_user

PACKAGE = Path(hpc_elastic.__file__).parent
PYTHON = [sys.executable, "-I", "-S"]
LIMIT_S = 30
HOST = os.uname().nodename
DONE = bytes([0, 0])  # what handover.py is told when the newcomer has ended, and nobody must know how


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run")


def guard(run, *command):
    return [*PYTHON, str(PACKAGE / "guard.py"), str(run.path), "7", *command]


def shell(text):
    return "/bin/sh", "-c", text


def python(text):
    return [*PYTHON, "-c", text]


def done(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, **options)


@contextlib.contextmanager
def started(command, **options):
    """Start it in a process group of its own, of which nothing is left afterwards."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def becomes_member(run, outcome="member"):
    run.put_record(RankRecord(member=Member(id=7, pid=1, host=HOST), outcome=outcome, time=0.0))


def files(run):
    return sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if not path.is_dir())


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


def state(pid):
    """Return the state of a process as in proc(5), "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def runs(pid):
    return state(pid) not in ("", "Z")


# --- how a rank ended -----------------------------------------------------------------------------------------------------


def test_a_good_end_is_recorded(run):
    before = time.time()
    ended = done(guard(run, *shell("echo $$; echo err >&2")))
    assert (ended.returncode, ended.stderr) == (0, "err\n")
    end = run.end_of(7)
    assert end is not None
    assert (end.member, end.host, end.code, end.signal, end.last_words) == (7, HOST, 0, 0, "err\n")
    assert end.pid == int(ended.stdout)
    assert before <= end.time <= time.time()
    assert 1 << 16 < end.peak_bytes < 1 << 30
    assert files(run) == ["ranks/7.end.json"]
    assert stat.S_IMODE((run.path / "ranks" / "7.end.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("code", [1, 3, 127, 255])
def test_an_exit_code_is_recorded(run, code):
    """A rank that was in no job yet has nobody who would go on without it, so the launcher hears of it."""
    assert done(guard(run, *shell(f"exit {code}"))).returncode == code
    end = run.end_of(7)
    assert (end.code, end.signal, end.how()) == (code, 0, f"ended with exit code {code}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGRTMIN + 6])
def test_a_death_by_signal_is_recorded(run, number):
    ended = done(guard(run, *shell(f"ulimit -c 0; echo $$; kill -{int(number)} $$")))
    assert ended.returncode == 128 + number
    end = run.end_of(7)
    assert (end.pid, end.code, end.signal) == (int(ended.stdout), 128 + number, number)


@pytest.mark.parametrize("end", ["exit 3", "kill -9 $$"])
def test_the_launcher_hears_nothing_of_a_member_that_is_lost(run, end):
    """The others go on without it."""
    becomes_member(run)
    assert done(guard(run, *shell(end))).returncode == 0
    assert run.end_of(7).code in (3, 137)
    assert not run.failed()


def test_the_launcher_hears_of_a_job_that_has_failed(run):
    becomes_member(run, "failed")
    assert run.fail(Failure(error="ValueError", traceback="", member=2, rank=1, host="node", generation=3, step=9))
    assert done(guard(run, *shell("exit 5"))).returncode == 5


def test_a_command_that_is_not_there(run):
    ended = done(guard(run, "/nowhere/python", "x"))
    assert ended.returncode == 127
    assert "/nowhere/python: No such file or directory" in ended.stderr
    assert "/nowhere/python: No such file or directory" in run.end_of(7).last_words


@pytest.fixture
def bound():
    """How a command is begun that can start no process: the one that there may be is that itself."""
    return [*as_user(54321), "prlimit", "--nproc=1"]


@pytest.mark.parametrize("kind", ["seed", "newcomer"])
def test_a_rank_that_cannot_be_started(run, bound, kind, tmp_path):
    """The guard says so in one line, as if the rank had."""
    command = guard(run, "true") if kind == "seed" else warm(run, tmp_path / "door", "true")
    ended = done([*bound, *command])
    assert ended.returncode == 127
    why = limits.AT_LIMIT
    assert ended.stderr == f"hpc_elastic: process 7 can't be started on {HOST}: {why}\n"
    end = run.end_of(7)
    assert (end.code, end.signal, end.last_words) == (127, 0, ended.stderr)
    assert not (tmp_path / "door").exists()


def test_the_launcher_of_a_rank_that_cannot_be_started_is_kept_calm(run, bound):
    with session() as (theirs, heard):
        environ = {**os.environ, "PMI_FD": str(theirs.fileno())}
        assert done([*bound, *guard(run, "true")], pass_fds=[theirs.fileno()], env=environ).returncode == 127
    assert b"".join(heard) == b"cmd=finalize\n"


def test_an_end_that_cannot_be_recorded_is_said(run):
    (run.path / "ranks").rename(run.path / "elsewhere")
    ended = done(guard(run, *shell("exit 5")))
    assert ended.returncode == 5
    assert "ended with exit code 5; could not be recorded" in ended.stderr


# --- last words -----------------------------------------------------------------------------------------------------------


def test_the_last_words_are_kept_and_all_is_passed_on(run):
    """Also what stands in the pipe when the rank dies, and bytes that are no text."""
    text = (
        "import os, sys; sys.stderr.write('x' * 200000 + '\\n'); os.write(2, b'\\xffend\"\\n' * 3); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(guard(run, *python(text)), capture_output=True, timeout=LIMIT_S, check=False)
    assert ended.stderr == b"x" * 200000 + b"\n" + b'\xffend"\n' * 3
    words = run.end_of(7).last_words
    assert words.endswith('x\n�end"\n�end"\n�end"\n')
    assert len(words.encode(errors="replace").replace("�".encode(), b"?")) == 4096


def test_who_else_holds_the_pipe_is_not_waited_for(run):
    begun = time.monotonic()
    with started(guard(run, *shell("sleep 1000 & echo err >&2"))) as process:
        assert process.wait(LIMIT_S) == 0
    assert time.monotonic() - begun < 10
    assert run.end_of(7).last_words == "err\n"


def test_nobody_who_listens(run):
    """The guard's own stderr is a pipe that is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(guard(run, *shell("echo err >&2; exit 3")), stderr=writer, timeout=LIMIT_S, check=False)
    os.close(writer)
    assert ended.returncode == 3
    assert run.end_of(7).last_words == "err\n"


def test_an_end_is_recorded_though_nobody_reads_what_the_rank_said(run):
    """The guard's own stderr is a pipe that is full."""
    reader, writer = os.pipe()
    with started(guard(run, *shell("head -c 100000 /dev/zero >&2")), stderr=writer):
        os.close(writer)
        until(lambda: run.end_of(7) is not None)
    os.close(reader)


def test_newcomers_that_a_rank_starts_get_the_stderr_of_its_guard(run):
    """So that they are heard when the guard has ended."""
    assert done(guard(run, *shell('echo direct >&"$_HPC_ELASTIC_STDERR"'))).stderr == "direct\n"
    assert run.end_of(7).last_words == ""


# --- signals, and reasons to end a rank -----------------------------------------------------------------------------------

# Not a shell: it can't trap what its parent ignored, as processes in the background ignore SIGINT and SIGQUIT. It waits for
# a signal that is blocked: Python calls no handler for one that comes just before `signal.pause`, and would stay there.
TRAP = """
import os, signal
signal.signal({number}, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [{number}])
os.write(1, b"ready\\n")
signal.sigwait([{number}])
os.write(1, b"heard")
os._exit(9)
"""
DEAF = "import os, signal; signal.signal(15, signal.SIG_IGN); os.write(1, b'%d\\n' % os.getpid()); signal.pause()"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
)
def test_signals_are_passed_to_the_rank(run, number):
    """The rank hears of it, and the guard ends as the rank does."""
    with started(guard(run, *python(TRAP.format(number=number.value))), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        until(lambda: catches(process.pid, number))
        process.send_signal(number)
        out, _ = process.communicate(timeout=LIMIT_S)
    assert out == "heard"
    assert process.returncode == 9


def test_a_signal_that_kills_the_rank_ends_the_guard(run):
    with started(guard(run, *shell("echo ready; exec sleep 1000")), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        until(lambda: catches(process.pid, signal.SIGTERM))
        process.terminate()
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert run.end_of(7).signal == signal.SIGTERM


@pytest.mark.parametrize("stopped", [False, True])
def test_who_is_condemned_is_killed(run, stopped):
    with started(guard(run, *python(DEAF)), stdout=subprocess.PIPE, text=True) as process:
        rank = int(process.stdout.readline())
        if stopped:
            os.kill(rank, signal.SIGSTOP)
            until(lambda: state(rank) == "T")
        run.condemn(7)
        process.wait(LIMIT_S)
    assert run.end_of(7).signal == signal.SIGKILL


def test_a_rank_whose_run_directory_is_gone_is_ended(run, tmp_path):
    with started(guard(run, *shell("echo $$; exec sleep 1000")), stdout=subprocess.PIPE, text=True) as process:
        rank = int(process.stdout.readline())
        run.path.rename(tmp_path / "elsewhere")
        process.wait(LIMIT_S)
    assert not runs(rank)


# --- the PMI session ------------------------------------------------------------------------------------------------------


def launcher(connection, heard):
    """Be MPICH's launcher, at the other end of a PMI session: acknowledge its end, and close it."""
    connection.settimeout(LIMIT_S)
    with connection, contextlib.suppress(ConnectionResetError):
        while part := connection.recv(100):
            heard.append(part)
            if part.endswith(b"cmd=get\n"):
                time.sleep(0.01)
                connection.sendall(b"cmd=get_result\n")
            if part.endswith(b"cmd=finalize\n"):
                with contextlib.suppress(BrokenPipeError):  # who asked may not wait for it
                    connection.sendall(b"cmd=finalize_ack\n")
                return


@contextlib.contextmanager
def session():
    """Open a PMI session: the rank's end, and what the launcher has heard once the block is left."""
    ours, theirs = socket.socketpair()
    heard = []
    thread = threading.Thread(target=launcher, args=(ours, heard))
    thread.start()
    with theirs:
        yield theirs, heard
    thread.join(LIMIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["exit 0", "exit 1", "kill -9 $$"])
def test_the_pmi_session_is_closed_for_the_rank(run, end):
    """However it ended: one that ends well may not have come that far."""
    becomes_member(run)
    with session() as (rank, heard):
        environ = {**os.environ, "PMI_FD": str(rank.fileno())}
        assert done(guard(run, *shell(end)), pass_fds=[rank.fileno()], env=environ).returncode == 0
    assert b"".join(heard) == b"cmd=finalize\n"


def test_a_pmi_session_that_the_rank_has_closed_is_left_alone(run):
    text = "import os; os.write(int(os.environ['PMI_FD']), b'cmd=finalize\\n'); os.read(int(os.environ['PMI_FD']), 100)"
    with session() as (rank, heard):
        environ = {**os.environ, "PMI_FD": str(rank.fileno())}
        done(guard(run, *python(text)), pass_fds=[rank.fileno()], env=environ)
    assert b"".join(heard) == b"cmd=finalize\n"


def test_an_answer_under_way_is_waited_for(run):
    """The launcher fails if it can't deliver it."""
    text = "import os; os.write(int(os.environ['PMI_FD']), b'cmd=get\\n'); os.kill(os.getpid(), 9)"
    with session() as (rank, heard):
        environ = {**os.environ, "PMI_FD": str(rank.fileno())}
        done(guard(run, *python(text)), pass_fds=[rank.fileno()], env=environ)
    assert b"".join(heard) == b"cmd=get\ncmd=finalize\n"


def test_a_launcher_that_is_gone(run):
    """The other end of the PMI session is closed: the guard records the end all the same."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        environ = {**os.environ, "PMI_FD": str(theirs.fileno())}
        ended = done(guard(run, *shell("exit 4")), pass_fds=[theirs.fileno()], env=environ)
    assert ended.returncode == 4
    assert run.end_of(7).code == 4


# --- the guard of a newcomer ----------------------------------------------------------------------------------------------


def warm(run, path, *command):
    return [*PYTHON, str(PACKAGE / "guard.py"), "--warm", str(path), str(run.path), "7", *command]


def connect(path):
    """Return a connection to the socket at `path`, as soon as somebody listens."""
    until(path.exists)
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        until(lambda: caller.connect_ex(f"/proc/self/fd/{folder}/{path.name}") == 0)
    finally:
        os.close(folder)
    caller.settimeout(LIMIT_S)
    return caller


def give(caller, session):
    """Hand over as handover.py does: variables, stdout, stderr and the PMI session."""
    socket.send_fds(caller, [b"gifts"], [1, 2, session.fileno()])


def test_a_newcomer_that_dies_before_it_is_wanted(run, tmp_path):
    assert done(warm(run, tmp_path / "door", *shell("exit 6"))).returncode == 6
    assert run.end_of(7).code == 6
    assert not run.failed()
    assert not (tmp_path / "door").exists()


@pytest.mark.parametrize(("answer", "said"), [(b"nit is stale", "cold: it is stale"), (b"", "cold: it has ended")])
def test_a_warm_parent_that_refuses(run, tmp_path, answer, said):
    """The newcomer starts as ever, and is told why; it has been asked for as it is."""
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent.bind(str(run.path / "warm" / f"{HOST}.sock"))
    parent.listen(1)
    parent.settimeout(LIMIT_S)
    command = warm(run, tmp_path / "door", *shell('echo "$_HPC_ELASTIC_START"'), "-m", "x")
    with parent, started(command, stdout=subprocess.PIPE, text=True) as process:
        line, _ = parent.accept()
        asked, descriptors, *_ = socket.recv_fds(line, 1 << 18, 8)
        if answer:
            line.send(answer)
        line.close()
        assert process.communicate(timeout=LIMIT_S)[0].rstrip("\n").partition(" ")[2] == said
    assert descriptors == []
    found = unpacked(asked)
    assert (found.executable, found.package, found.arguments) == ("/bin/sh", str(PACKAGE), ["-m", "x"])


RANK = """
import os, signal, socket, time
door = socket.socket(fileno=int(os.environ["HPC_ELASTIC_DOOR"]))
data, (stdout, stderr, session), _, _ = socket.recv_fds(door, 1 << 18, 3)
os.write(session, b"rank " + data)
{init}
{end}
"""
INIT = "door.send(b'i')"
KILL = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(("end", "code"), [("", 0), ("os._exit(3)", 3), (KILL, 137)])
def test_what_the_launcher_gave_is_handed_on(run, tmp_path, end, code):
    """The rank gets data and descriptor; whoever brought them keeps calm, and so does the launcher."""
    folder = tmp_path / ("long" * 40)  # more than a socket's name may have
    folder.mkdir()
    rank = python(RANK.format(init=INIT, end=end))
    with session() as (theirs, heard), started(warm(run, folder / "door", *rank)) as process:
        with connect(folder / "door") as caller:
            give(caller, theirs)
            theirs.close()
            assert caller.recv(10) == DONE
        assert process.wait(LIMIT_S) == code
    assert b"".join(heard) == b"rank giftscmd=finalize\n"
    assert run.end_of(7).code == code
    assert not (folder / "door").exists()


def test_how_a_newcomer_ended_is_told_when_the_job_has_failed(run, tmp_path):
    wait = f"while not os.path.exists({str(run.path / 'failure.json')!r}): time.sleep(.01)"
    rank = python(RANK.format(init=INIT, end=f"{wait}\nos._exit(3)"))
    with session() as (theirs, heard), started(warm(run, tmp_path / "door", *rank)), connect(tmp_path / "door") as caller:
        give(caller, theirs)
        until(lambda: heard)
        assert run.fail(Failure(error="ValueError", traceback="", member=2, rank=1, host="node", generation=3, step=9))
        assert caller.recv(10) == bytes([0, 3])


def test_somebody_must_stand_in_for_a_newcomer_that_dies_in_mpi_init(run, tmp_path):
    """The session stays open for that one."""
    rank = python(RANK.format(init="", end=KILL))
    with session() as (theirs, heard), started(warm(run, tmp_path / "door", *rank)), connect(tmp_path / "door") as caller:
        give(caller, theirs)
        assert caller.recv(10) == bytes([1, 0])
    assert b"".join(heard) == b"rank gifts"


def test_and_for_one_that_dies_just_when_it_is_called(run, tmp_path):
    """The guard finds both at once: the call, and that it is too late."""
    rank = python("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    with session() as (theirs, heard), started(warm(run, tmp_path / "door", *rank), stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        until(lambda: state(process.pid) == "T")
        with connect(tmp_path / "door") as caller:
            give(caller, theirs)
            os.kill(pid, signal.SIGKILL)
            until(lambda: state(pid) == "Z")
            process.send_signal(signal.SIGCONT)
            assert caller.recv(10) == bytes([1, 0])
    assert not heard


def test_who_comes_for_one_that_has_ended_is_refused(run, tmp_path):
    """And has somebody stand in for it: to be let in and not answered would look as if the guard had been killed."""
    burying = Guard(str(run.path), "7", str(tmp_path / "door"))
    burying.stderr = -1
    theirs = burying.open_door()
    came = []

    def there(*_):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            came.append(caller.connect_ex(str(tmp_path / "door")))
        return False

    burying.there = there
    burying.bury()
    assert came == [errno.ECONNREFUSED]
    burying.door.close()
    for descriptor in (theirs, burying.leader):
        os.close(descriptor)


LEADER = """
import subprocess, sys
subprocess.Popen(sys.argv[1:])
sys.stdin.read()
"""


@contextlib.contextmanager
def led(run, door, rank):
    """Start a newcomer by a leader that ends when its stdin is closed."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with started([*python(LEADER), *warm(run, door, *rank)], **options) as leader:
        yield leader


SAY = "print(os.getpid(), flush=True)"


def test_a_newcomer_whose_leader_is_gone_is_killed(run, tmp_path):
    with led(run, tmp_path / "door", python(f"import os, signal; {SAY}; signal.pause()")) as leader:
        rank = int(leader.stdout.readline())
        leader.stdin.close()
        until(lambda: run.end_of(7) is not None)
        assert not runs(rank)
    assert run.end_of(7).signal == signal.SIGKILL


def test_so_is_one_whose_leader_was_gone_before_its_guard_could_look(run, tmp_path):
    """Its parent is another one by then."""
    begin = "import os, subprocess, sys; subprocess.Popen(sys.argv[1:], env={'_HPC_ELASTIC_LEADER_PID': str(os.getpid())})"
    parent = "int(os.environ['_HPC_ELASTIC_LEADER_PID'])"
    later = f"import os, sys, time\nwhile os.getppid() == {parent}: time.sleep(0.01)\nos.execv(sys.argv[1], sys.argv[1:])"
    rank = python(f"import os, signal; {SAY}; signal.pause()")
    command = [*python(begin), *python(later), *warm(run, tmp_path / "door", *rank)]
    with started(command, stdout=subprocess.PIPE, text=True) as leader:
        out, _ = leader.communicate(timeout=LIMIT_S)
        assert not runs(int(out))
    assert run.end_of(7).signal == signal.SIGKILL


def test_it_is_killed_in_mpi_init_too_and_nobody_stands_in_for_it(run, tmp_path):
    """Whoever called the newcomer waits no more."""
    rank = python(RANK.format(init="", end="signal.pause()"))
    with session() as (theirs, heard), led(run, tmp_path / "door", rank) as leader, connect(tmp_path / "door") as caller:
        give(caller, theirs)
        theirs.close()
        until(lambda: heard)
        leader.stdin.close()
        assert caller.recv(10) == DONE
    assert b"".join(heard) == b"rank giftscmd=finalize\n"


def test_a_member_outlives_the_leader_that_started_it(run, tmp_path):
    rank = python(RANK.format(init=INIT, end="signal.pause()"))
    with session() as (theirs, heard), led(run, tmp_path / "door", rank) as leader, connect(tmp_path / "door") as caller:
        give(caller, theirs)
        theirs.close()
        until(lambda: heard)
        becomes_member(run)
        leader.stdin.close()
        leader.wait(LIMIT_S)
        caller.settimeout(4)  # longer than the guard would leave somebody who was forgotten
        with pytest.raises(TimeoutError):
            caller.recv(10)


def test_a_newcomer_whose_launcher_has_given_it_up_is_ended(run, tmp_path):
    """The launcher has killed handover.py."""
    rank = python(RANK.format(init=INIT, end="signal.pause()"))
    with session() as (theirs, _), started(warm(run, tmp_path / "door", *rank)) as process:
        with connect(tmp_path / "door") as caller:
            give(caller, theirs)
            theirs.close()
        process.wait(LIMIT_S)
    assert run.end_of(7).signal == signal.SIGTERM


def test_a_newcomer_of_a_job_that_has_failed_is_ended(run, tmp_path):
    with started(warm(run, tmp_path / "door", *shell("exec sleep 1000"))) as process:
        assert run.fail(Failure(error="ValueError", traceback="", member=2, rank=1, host="node", generation=3, step=9))
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM


def test_sigterm_ends_a_newcomer_that_does_not_heed_it(run, tmp_path):
    """As long as it is not wanted."""
    with started(warm(run, tmp_path / "door", *python(DEAF)), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.terminate()
        assert process.wait(LIMIT_S) == 128 + signal.SIGKILL


# --- the handover ---------------------------------------------------------------------------------------------------------


def handover(path, **options):
    """Start handover.py as a launcher does that has variables and a PMI session to give."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "OMPI"))}
    environ |= {"PMI_RANK": "0", "HOME": "/", **options.pop("environ", {})}
    return started([*PYTHON, str(PACKAGE / "handover.py"), str(path)], env=environ, **options)


@pytest.mark.parametrize(("answer", "code"), [(b"\0\0", 0), (b"\0\x03", 3)])
def test_the_handover_stands_for_the_newcomer(tmp_path, answer, code):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, session() as (theirs, _):
        listener.bind(str(tmp_path / "door"))
        listener.listen(1)
        environ = {"PMI_FD": str(theirs.fileno())}
        giver = handover(tmp_path / "door", environ=environ, pass_fds=[theirs.fileno()])
        with giver as process, listener.accept()[0] as guard:
            data, (stdout, stderr, descriptor), _, _ = socket.recv_fds(guard, 1 << 18, 3)
            assert set(data.split(b"\0")) >= {b"PMI_RANK=0", f"PMI_FD={theirs.fileno()}".encode()}
            assert b"HOME" not in data
            os.write(descriptor, b"cmd=finalize\n")
            for given in (stdout, stderr, descriptor):
                os.close(given)
            guard.send(answer)
            assert process.wait(LIMIT_S) == code


MPI4PY = """
class Comm:
    def Free(self): print("freed")
    def Get_parent(): return Comm()
class MPI:
    Comm, COMM_NULL = Comm, None
"""


@pytest.mark.parametrize("gone", ["never there", "told"])
@pytest.mark.parametrize(("port", "said"), [({}, "freed\n"), ({"OMPI_PARENT_PORT": "port"}, "")])
def test_somebody_stands_in_for_a_newcomer_that_is_gone(tmp_path, gone, port, said):
    """So that the leader's call returns. Under a guard of its own, the launcher keeps calm whatever becomes of it.

    Where nobody can stand in, the leader is told of it.
    """
    (tmp_path / "mpi4py.py").write_text(MPI4PY)
    environ = {"PYTHONPATH": str(tmp_path), **port}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, session() as (theirs, heard):
        if gone != "never there":
            listener.bind(str(tmp_path / "7.sock"))
            listener.listen(1)
        environ["PMI_FD"] = str(theirs.fileno())
        fds = [theirs.fileno()]
        with handover(tmp_path / "7.sock", environ=environ, pass_fds=fds, stdout=subprocess.PIPE, text=True) as process:
            theirs.close()
            if gone != "never there":
                with listener.accept()[0] as guard:
                    guard.recv(1 << 18)
                    guard.send(b"\1\0")
            out, _ = process.communicate(timeout=LIMIT_S)
            assert (process.returncode, out) == (0, said)
    assert b"".join(heard) == (b"cmd=finalize\n" if said else b"")
    assert (tmp_path / "7.parent").exists() == bool(port)
    if port:
        assert (tmp_path / "7.parent").read_text() == "port:connect"


def test_the_handover_of_a_guard_that_was_killed_closes_the_session(tmp_path):
    """The rank ends itself then; the launcher keeps calm."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, session() as (theirs, heard):
        listener.bind(str(tmp_path / "7.sock"))
        listener.listen(1)
        environ = {"PMI_FD": str(theirs.fileno())}
        with handover(tmp_path / "7.sock", environ=environ, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            with listener.accept()[0] as guard:
                guard.recv(1 << 18)
            assert process.wait(LIMIT_S) == 0
    assert b"".join(heard) == b"cmd=finalize\n"
