"""What a warm parent imports, whom it is right for, and how it is asked."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import numpy as np
import pytest

from hpc_elastic import guard, newborn, warm, warmth

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
    assert warmth.preloadable(found, (Path("/lib/json"), Path("/lib/site"))) == ["json", "numpy", "mpi4py"]


def test_request_is_read_as_it_was_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"A": "1=2", "EMPTY": "", "LINES": "a\nb", "ODD": os.fsdecode(b"\xff")})
    before = os.umask(0o27)
    try:
        data = guard.request([sys.executable, "-m", "hpc_elastic.worker", "/a run", "7"])
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
    names, path = ["library.deep", "json", "hpc_elastic"], [str(first), str(second)]
    before = warmth.stamps(names, path)
    assert f"{PACKAGE}/guard.py" in before
    assert "json" not in before
    (second / "library" / "__init__.py").write_text("VERSION = 2\n")
    after = warmth.stamps(names, path)
    assert {name for name in after if after[name] != before[name]} == {"library"}
    (first / "library" / "__init__.py").write_text("")  # now found before the other one
    assert warmth.stamps(names, path)["library"] != after["library"]


PRELOAD = """
import sys
from hpc_elastic.warm import preload
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
