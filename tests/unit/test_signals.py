"""Signals to a rank whose leader can't be asked."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from hpc_elastic.rundir import RunDirectory
from hpc_elastic.runtime.signals import heeded

LIMIT_S = 20.0


@pytest.mark.parametrize(("number", "what"), [(signal.SIGTERM, "leave"), (signal.SIGINT, "stop")])
def test_a_run_directory_that_can_not_be_written(number, what, tmp_path, capfd):
    """It is said, and the rank goes on."""
    run = RunDirectory.create(tmp_path / "r")
    with heeded(run, 1):
        shutil.rmtree(run.path)
        os.kill(os.getpid(), number)
    first, *more = capfd.readouterr().err.splitlines()
    assert first == f"hpc_elastic: the leader can't be asked to {what}: No such file or directory"
    assert more == (["hpc_elastic: Ctrl-C again ends it now"] if number == signal.SIGINT else [])


def test_nobody_reads_what_is_said(tmp_path):
    """Such as ``tee``, which Ctrl-C ends as well: the job stops with a checkpoint nevertheless."""
    run = RunDirectory.create(tmp_path / "r")
    code = """
import os, pathlib, signal, sys
from hpc_elastic.rundir import RunDirectory
from hpc_elastic.runtime.signals import heeded
with heeded(RunDirectory(pathlib.Path(sys.argv[1])), 0):
    os.kill(os.getpid(), signal.SIGINT)
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code, run.path], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0


def test_a_signal_in_the_midst_of_a_word(tmp_path, monkeypatch):
    """The job is asked to stop, which is said in between; the rank goes on with what it was about to say."""
    run, heard = RunDirectory.create(tmp_path / "r"), []
    reader, writer = os.pipe()
    room = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)

    def until(done):
        limit = time.monotonic() + LIMIT_S
        while not done() and time.monotonic() < limit:
            time.sleep(0.01)

    def listen():
        until(lambda: int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder) == room)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        until(run.requests)
        while data := os.read(reader, room):
            heard.append(data)

    listener = threading.Thread(target=listen)
    listener.start()
    with open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with heeded(run, 1):
            print("x" * 2 * room, file=sys.stderr)
    listener.join(LIMIT_S)
    os.close(reader)
    said = b"hpc_elastic: stopping at the next step, with a checkpoint; Ctrl-C again ends it now\n"
    assert said in (words := b"".join(heard))
    assert words.replace(said, b"") == b"x" * 2 * room + b"\n"
    assert [request.kind for _, request in run.requests()] == ["stop"]
