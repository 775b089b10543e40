"""What a warm parent imports, whom it is right for, and how it is asked."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np
import pytest

from hpc_elastic import adoption, newborn, processes, warm, warmth

PACKAGE = str(warmth.PACKAGE)


def module(name, origin, **held):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin=origin)
    vars(made).update(held)
    return made


def asked(**differing):
    plain = warmth.Asked(
        executable=sys.executable, package=PACKAGE, directory="/", umask=0o22, arguments=["r", "3"], environ={"A": "1"}
    )
    return msgspec.structs.replace(plain, **differing)


def why(who, now=()):
    before = {"keras": (1, 2, 3), "tensorflow": (1, 2, 3)}
    return warmth.mismatch(who, {"A": "1"}, before, {**before, **dict(now)})


def test_installed_modules_without_mpi_are_preloaded():
    mpi = module("mpi4py.MPI", "/lib/site/mpi4py/MPI.so")
    touchy = type("Lazy", (ModuleType,), {"__getattr__": lambda *_: pytest.fail("it was touched")})("lazy")
    found = {
        "sys": module("sys", "built-in"),
        "json": module("json", "/lib/json/__init__.py"),
        "numpy": module("numpy", "/lib/site/numpy/__init__.py"),
        "alias": module("numpy", "/lib/site/numpy/__init__.py"),
        "mine": module("mine", "/home/me/mine.py"),
        "site_too": module("site_too", "/lib/site-too.py"),
        "mpi4py": module("mpi4py", "/lib/site/mpi4py/__init__.py"),
        "mpi4py.MPI": mpi,
        "speaks": module("speaks", "/lib/site/speaks.py", MPI=mpi),
        "lazy": touchy,
        "__main__": module("__main__", "/lib/runpy.py"),
    }
    assert warmth.preloadable(found, (Path("/lib/json"), Path("/lib/site"))) == {
        "json": "/lib/json/__init__.py",
        "numpy": "/lib/site/numpy/__init__.py",
        "mpi4py": "/lib/site/mpi4py/__init__.py",
    }


def test_request_is_read_as_it_was_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"A": "1=2", "EMPTY": "", "LINES": "a\nb", "ODD": os.fsdecode(b"\xff")})
    before = os.umask(0o27)
    try:
        data = adoption.request([sys.executable, "-m", "hpc_elastic.worker", "/a run", "7"])
    finally:
        os.umask(before)
    assert warmth.unpacked(data) == warmth.Asked(
        executable=sys.executable,
        package=PACKAGE,
        directory=str(tmp_path),
        umask=0o27,
        arguments=["/a run", "7"],
        environ=dict(os.environ),
    )


@pytest.mark.parametrize("data", [b"", b"a\0b\0c\0d\0e", b"a\0b\0c\x0018\x003\0x", b"a\0b\0c\x0018\x000\0nothing"])
def test_what_is_no_request(data):
    with pytest.raises(ValueError):  # noqa: PT011  (of several kinds)
        warmth.unpacked(data)


def test_who_is_served():
    assert why(asked()) == ""
    own = {"A": "1", "HPC_ELASTIC_DOOR": "5", "CUDA_VISIBLE_DEVICES": "1", "SLURM_JOB_ID": "9", "PMI_FD": "3"}
    assert why(asked(environ=own)) == ""


@pytest.mark.parametrize(
    ("who", "now", "reason"),
    [
        ({"executable": "/bin/other"}, {}, f"it runs {sys.executable}, and the newcomer /bin/other"),
        ({"package": "/elsewhere"}, {}, f"it has imported {PACKAGE}, and the newcomer is of /elsewhere"),
        ({}, {"keras": (1, 2, 4)}, "keras changed since it was imported"),
        ({"environ": {"A": "2", "OMP_NUM_THREADS": "1"}}, {}, "the environment differs in A, OMP_NUM_THREADS"),
    ],
)
def test_who_is_not(who, now, reason):
    assert why(asked(**who), now) == reason


def test_stamps_tell_of_another_version(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "library").mkdir(parents=True)
    (second / "library" / "__init__.py").write_text("")
    (second / "library" / "deep.py").write_text("")
    files = {"library": second / "library" / "__init__.py", "library.deep": second / "library" / "deep.py"}
    names, path = {name: str(file) for name, file in files.items()}, [str(first), str(second)]
    before = warmth.stamps({**names, "hpc_elastic.guard": f"{PACKAGE}/guard.py"}, path)
    assert f"{PACKAGE}/guard.py" in before
    assert before.keys() >= names.keys()
    for name, file in files.items():
        file.write_text("VERSION = 2\n")
        after = warmth.stamps(names, path)
        assert {name for name in after if after[name] != before[name]} == {name}
        before = after
    (first / "library" / "__init__.py").write_text("")  # now found before the other one
    assert warmth.stamps(names, path)["library"] != before["library"]
    files["library.deep"].unlink()
    assert "library.deep" not in warmth.stamps(names, path)


PRELOAD = """
import sys
import time
from hpc_elastic.preloading import preload
sys.path.insert(0, sys.argv[1])
found = preload(["asks", "asks.deep", "fails", "json"])
print(found, [n for n in sys.modules if n in ("asks", "asks.deep", "mpi4py.MPI")])
try:
    import asks
except ZeroDivisionError:
    print("asked anew")
"""


def test_mpi_is_refused_so_that_nobody_goes_without_it(tmp_path):
    (tmp_path / "asks").mkdir()
    (tmp_path / "asks" / "deep.py").write_text("")
    asking = "try:\n    from mpi4py import MPI\nexcept ImportError:\n    MPI = None\n"
    (tmp_path / "asks" / "__init__.py").write_text(f"from . import deep\n{asking}1 / 0\n")
    (tmp_path / "fails.py").write_text("raise OSError('no licence')\n")
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["{'fails': 'OSError: no licence'} []", "asked anew"]


def test_other_users_are_not_served(monkeypatch):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        why = warm.WarmParent.unfit(SimpleNamespace(), ours, b"")
    assert why == f"it serves user {user + 1}, and user {user} asks"


def test_each_draws_random_numbers_of_its_own():
    drawn = set()
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  (libraries use it)
        newborn.reseed()
        drawn |= {random.random(), np.random.random()}  # noqa: NPY002
    assert len(drawn) == 6


# --- the parent, in a process of its own ----------------------------------------------------------------------------------

HOST = os.uname().nodename


@pytest.fixture
def parents(tmp_path):
    """Start warm parents of a run that imports next to nothing; `environ` is theirs, `setup` runs in them before."""
    (tmp_path / "warm").mkdir()
    (tmp_path / "ranks").mkdir()
    started = []

    def start(setup="", modules=(), **environ):
        environ = {**os.environ, **environ}
        spec = warmth.Spec(
            modules=dict(modules), rehearsals={}, path=[*sys.path, str(tmp_path)], command=[], environ=environ
        )
        (tmp_path / "warm" / "spec.json").write_bytes(msgspec.json.encode(spec))
        program = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\nfrom hpc_elastic import warm\n{setup}\nwarm.main()"
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=pipe, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def until(done, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of(tmp_path):
    """Return the pid of the parent that listens, of whom a guard asks."""
    return int((tmp_path / "warm" / f"{HOST}.lock").read_text() or 0)


def serves(tmp_path, process):
    socket_there = (tmp_path / "warm" / f"{HOST}.sock").exists()
    return socket_there and pid_of(tmp_path) == process.pid


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Ask as a guard does; return the answer and the line, which the child takes for its guard's."""
    with contextlib.ExitStack() as stack:

        def asking(**environ):
            monkeypatch.setattr(os, "environ", {**os.environ, **environ})
            line = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line.settimeout(20)
            folder = os.open(tmp_path / "warm", os.O_RDONLY)
            line.connect(f"/proc/self/fd/{folder}/{HOST}.sock")
            os.close(folder)
            command = [sys.executable, "-m", "hpc_elastic.worker", str(tmp_path), "1"]
            line.send(adoption.request(command))
            answer, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
            for descriptor in descriptors:
                os.close(descriptor)
            return answer.decode(), line

        yield asking


def test_stale_parent_makes_room_while_it_has_a_child(parents, ask, tmp_path):
    """And leaves the next one's socket where it is."""
    first = parents("warm.GO_S = 60")
    until(lambda: serves(tmp_path, first))
    answer, line = ask()
    assert answer[0] == "f"
    refusal, _ = ask(NEW="1")
    assert refusal == "nthe environment differs in NEW"
    second = parents(NEW="1")
    until(lambda: serves(tmp_path, second))
    assert first.poll() is None  # as its child waits for a word
    line.shutdown(socket.SHUT_WR)
    assert line.recv(100).split()[0] == b"0"  # how the child has ended
    assert first.wait(20) == 0
    assert serves(tmp_path, second)
    assert ask(NEW="1")[0][0] == "f"


@pytest.fixture
def stopped(parents, tmp_path):
    """Start a parent, and stop it when all that are to wait do so."""
    process = parents("warm.BEATS_S = 0.1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: serves(tmp_path, process) and len(children.read_text().split()) == warm.AHEAD)
    process.send_signal(signal.SIGSTOP)
    until(lambda: processes.is_stopped(process.pid))
    return process


@pytest.mark.usefixtures("stopped")
def test_parent_that_is_stopped_holds_nothing_of_the_launcher(tmp_path):
    """Which waits for its job's end until nobody can write to what it reads."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "hpc_elastic.worker", str(tmp_path), "1"]
    assert adoption.adopt(str(tmp_path), command, [writer]) == "it did not answer within 1 s"
    os.close(writer)
    assert select.select([reader], [], [], 0)[0]
    os.close(reader)


def test_those_that_wait_end_a_parent_that_is_stopped_when_the_run_is_over(stopped, tmp_path):
    """Nobody else may be there."""
    (tmp_path / "status.json").write_text('{"state": "ended"}')
    assert stopped.wait(20) == -signal.SIGKILL


def test_parent_is_stale_for_what_its_modules_import_themselves(parents, ask, tmp_path):
    """Such as settings of the user's own, which are none of those that it is told to import."""
    own, installed = tmp_path / "own_settings.py", tmp_path / "installed_one.py"
    own.write_text("VALUE = 1\n")
    installed.write_text("import own_settings\n")
    parent = parents("", {"installed_one": str(installed)})
    until(lambda: serves(tmp_path, parent))
    own.write_text("VALUE = 22\n")
    assert ask()[0] == "nown_settings changed since it was imported"


def test_parent_that_can_not_fork_ahead_serves_later(parents, ask, tmp_path):
    """As where there may be no more processes."""
    setup = """
import os
usual, times = os.fork, []
def fork():
    times.append(0)
    if 1 < len(times) < 4:  # the first one is its look for threads
        raise BlockingIOError(11, "no more processes")
    return usual()
os.fork = fork
"""
    parent = parents(setup)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    until(lambda: serves(tmp_path, parent) and len(children.read_text().split()) == warm.AHEAD)
    assert ask()[0][0] == "f"


def test_those_that_die_as_they_wait_are_forked_less_and_less_often(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(warm.time, "monotonic", lambda: clock[0])
    parent = SimpleNamespace(pause_s=warm.PAUSE_S, next_ahead=0.0)
    pauses = []
    for _ in range(6):
        warm.WarmParent.put_off(parent)
        pauses.append(parent.next_ahead)
    doubled = [warm.PAUSE_S * 2**n for n in range(6)]
    assert pauses == [pause if pause <= warm.LONGEST_PAUSE_S else float("inf") for pause in doubled]


def test_parent_with_threads_says_why_it_does_not_serve(parents, tmp_path):
    file = tmp_path / "goes_on.py"
    file.write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n")
    parent = parents("warm.SETTLE_S = 0.1", {"goes_on": str(file)})
    assert parent.wait(20) == 1
    why = "what it imports goes on in 1 threads, which a fork does not take along"
    assert adoption.unready(str(tmp_path / "warm" / HOST)) == why


def test_a_rehearsal_that_hangs_ends_its_process(tmp_path):
    """So the parent has another one forked in its place, and nobody waits for it."""
    (tmp_path / "hanging.py").write_text("import threading\ndef rehearse(number):\n    threading.Event().wait()\n")
    program = (
        f"import sys; sys.path.append({str(tmp_path)!r})\nfrom hpc_elastic import newborn, warmth\nnewborn.LONGEST_S = 1\n"
        "newborn.get_ready(warmth.Spec(modules={}, rehearsals={'hanging': {'number': 1}}, path=[], command=[], environ={}))"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGALRM, "")
