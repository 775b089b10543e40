"""What companions print is passed on in whole lines, once; what the launcher prints, also where nobody reads it."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic import relay
from hpc_elastic.config import RUN_VARIABLE
from hpc_elastic.outputs import Outputs, Relay
from hpc_elastic.streams import put
from tests.launch import until

LIMIT_S = 20.0
# Stands in for the supervisor: it has a launcher print.
PASSES_ON = """
import os, subprocess, sys
from hpc_elastic.outputs import Relay
relay = Relay()
launcher = subprocess.Popen(sys.argv[1:], stdout=relay.stdout, stderr=relay.stderr)
relay.begun()
code = launcher.wait()
relay.finish()
sys.exit(code)
"""


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=12)), max_size=12))
def test_everything_once_and_in_order(tmp_path_factory, pieces):
    folder, to = tmp_path_factory.mktemp("companions"), io.BytesIO()
    outputs = Outputs(folder, to)
    wanted = dict.fromkeys(range(3), b"")
    for number, piece in pieces:
        with (folder / f"{number}.out").open("ab") as file:
            file.write(piece)
        wanted[number] += piece
        before = to.getvalue()
        outputs.pass_on()
        new = to.getvalue()[len(before) :]
        assert not new or new.endswith(b"\n")
    for number in range(3):
        (folder / f"{number}.end").touch()
    outputs.finish()
    outputs.pass_on(all_of_it=True)
    assert sorted(to.getvalue()) == sorted(b"".join(wanted.values()))


def test_what_a_run_printed_before_it_is_resumed(tmp_path):
    (tmp_path / "0.out").write_bytes(b"old\n")
    to = io.BytesIO()
    outputs = Outputs(tmp_path, to)
    with (tmp_path / "0.out").open("ab") as file:
        file.write(b"new\n")
    outputs.pass_on()
    assert to.getvalue() == b"new\n"


def test_no_companions(tmp_path):
    outputs = Outputs(tmp_path / "none", io.BytesIO())
    outputs.pass_on()
    outputs.finish()


def passed_on(*command, **to):
    """Start a program that has `command` print."""
    return subprocess.Popen(
        [sys.executable, "-c", PASSES_ON, *command], **to, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    )


def test_both_streams_are_passed_on():
    process = passed_on("sh", "-c", "echo out; echo err >&2", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=LIMIT_S) == (b"out\n", b"err\n")


def test_their_order_stays_where_they_go_to_one_place():
    says = "for i in 1 2 3 4 5 6 7 8 9; do echo o$i; echo e$i >&2; done"
    process = passed_on("sh", "-c", says, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.communicate(timeout=LIMIT_S)[0].decode().split() == [f"{x}{i}" for i in range(1, 10) for x in "oe"]


def test_much_is_passed_on_to_who_reads_slowly():
    size = 1 << 22
    process = passed_on("head", "-c", str(size), "/dev/zero", stdout=subprocess.PIPE)
    assert len(process.communicate(timeout=LIMIT_S)[0]) == size
    assert process.returncode == 0


@pytest.mark.parametrize("gone", ["out", "err"])
def test_nobody_reads(gone):
    """The launcher does not notice it; the other stream is read on."""
    reader, writer = os.pipe()
    os.close(reader)
    says = "echo 1; echo 1 >&2; head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2; exec echo end || exit 9"
    places = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {f"std{gone}": writer}
    process = passed_on("sh", "-ec", says, **places)
    os.close(writer)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert (err if gone == "out" else out[:-4]) == b"1\n" + bytes(1_000_000)


def test_a_disk_that_was_full_may_have_room_again(monkeypatch):
    reader, writer = os.pipe()
    end, to = os.pipe()
    write, lost = os.write, []

    def full_at_first(where, data):
        if lost:
            return write(where, data)
        lost.append(data)
        write(writer, b"two\n")
        os.close(writer)
        raise OSError(errno.ENOSPC, "full")

    write(writer, b"one\n")
    monkeypatch.setattr(os, "write", full_at_first)
    relay.serve({reader: to})
    assert (lost, os.read(end, 100)) == ([b"one\n"], b"two\n")
    for descriptor in (reader, end, to):
        os.close(descriptor)


def test_the_relay_has_what_its_python_needs(monkeypatch):
    """Where modules are loaded, Python finds its library by a variable. But it is no process of a run."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    monkeypatch.setenv(RUN_VARIABLE, "r")
    its = Relay()
    shown = Path(f"/proc/{its._process.pid}/environ")
    until(shown.read_text)  # while it begins, there is nothing to be seen
    environ = shown.read_text().split("\0")
    its.begun()
    its.finish()
    assert "LD_LIBRARY_PATH=/opt/python/lib" in environ
    assert not [entry for entry in environ if entry.startswith(RUN_VARIABLE)]


def test_a_relay_that_is_stopped_is_not_left_behind():
    its = Relay()
    its._process.send_signal(signal.SIGSTOP)
    its.begun()
    its.finish()
    assert its._process.returncode == 0


def test_words_that_do_not_fit_on_the_disk(tmp_path):
    """They are gone; what comes when there is room is written, and nothing fails when the process ends."""
    with open("/dev/full", "w", encoding="ascii") as stream:
        put(stream, "a word\n")
        with (tmp_path / "room").open("w") as room:
            os.dup2(room.fileno(), stream.fileno())
        put(stream, "another\n")
    assert (tmp_path / "room").read_text() == "another\n"


def test_what_nobody_reads_goes_nowhere_from_then_on():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as stream:  # closing it would fail, if anything were left in its buffer
        put(stream, "a word\n")
        put(stream, "another\n")
        assert Path(f"/proc/self/fd/{writer}").readlink() == Path(os.devnull)


@pytest.mark.parametrize("closed", [{0}, {1}, {2}, {0, 1, 2}])
def test_streams_that_are_closed_go_nowhere(closed, tmp_path):
    """And are no other file's, for children as well."""
    code = """
import os, subprocess, sys
from hpc_elastic.streams import have_all
have_all()
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) > 2
subprocess.run(["sh", "-c", "echo out; echo err >&2; cat"], check=True)
"""
    shell = f"""exec "$@" {" ".join(f"{number}>&-" for number in closed)}"""
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", code, tmp_path / "file"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environ, input=b"", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (b"" if 1 in closed else b"out\nout\n")
    assert done.stderr == (b"" if 2 in closed else b"err\nerr\n")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_that_has_the_number_of_a_stream_is_not_printed_into(tmp_path):
    """The script has opened it, before there was anybody to see that stdout was closed."""
    code = """
import sys
file = open(sys.argv[1], "w")
from hpc_elastic.streams import have_all
assert file.fileno() == 1
have_all()
print("out", flush=True)
"""
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code, tmp_path / "file"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""
