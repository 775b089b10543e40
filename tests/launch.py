"""Runs jobs for tests: a limit outside the process, all stacks when it is passed, and a look for what is left behind."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_elastic.comm.vendor import VENDORS, find_mpiexec, prepare

from .afterwards import unfinished

ROOT = Path(__file__).parent.parent
MARK = "JOB_UNDER_TEST"
SCRIPTS = Path(__file__).parent / "elastic" / "scripts"
GONE_WITHIN_S = 5.0
SHARED_MEMORY = Path("/dev/shm")
OWN_MEMORY = 'mount --bind "$0" /dev/shm && exec "$@"'  # run in a mount namespace of its own


@dataclass
class Done:
    """A job that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    def value(self, name: str) -> str:
        """Return what the job printed as ``name value``: one value, which may be printed again after a restart."""
        lines = {line for line in self.out.splitlines() if line.startswith(name + " ")}
        assert len(lines) == 1, f"{len(lines)} values of {name!r} in the output:\n{self.out}\n{self.err}"
        return lines.pop().split(maxsplit=1)[1]


class Job:
    """A job under way. Use as a context manager: it is ended, and looked after, when the block is left."""

    def __init__(self, command: Sequence[str], *, folder: Path, limit_s: float = 60, environ: dict[str, str] | None = None):
        self.mark = uuid.uuid4().hex
        self.limit_s = limit_s
        self._begun = time.monotonic()
        self._own_memory = SHARED_MEMORY / f"test-{self.mark}" if memories_apart() else None
        self._shared = _shared_memory(SHARED_MEMORY)
        self._folder = folder
        self._files = folder / f"out-{self.mark[:8]}", folder / f"err-{self.mark[:8]}"
        self._temporary = folder / f"tmp-{self.mark[:8]}"
        self._temporary.mkdir()
        own = {MARK: self.mark, "PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary)}
        # Most tests are over before a warm parent would be of use.
        environment = {"HPC_ELASTIC_WARM": "off", **os.environ, **(environ or {}), **own}
        prepare(environment)
        apart: list[str] = []
        if self._own_memory is not None:
            self._own_memory.mkdir()
            apart = ["unshare", "--mount", "sh", "-c", OWN_MEMORY, str(self._own_memory)]
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*apart, *command],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self._kill()
        if self._own_memory is not None:
            shutil.rmtree(self._own_memory)

    def seconds(self) -> float:
        """Return how long ago it was started."""
        return time.monotonic() - self._begun

    def text(self) -> tuple[str, str]:
        """Return what it has printed so far."""
        return self._files[0].read_text(errors="replace"), self._files[1].read_text(errors="replace")

    def left(self) -> list[int]:
        """Return the pids of its processes that run."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def wait(self, *, clean: bool = True) -> Done:
        """Wait for its end, at most as long as the limit; nothing may be left behind."""
        try:
            self.process.wait(max(1.0, self.limit_s - (time.monotonic() - self._begun)))
        except subprocess.TimeoutExpired:
            stacks = self.stacks()
            self._kill()
            out, err = self.text()
            raise AssertionError(
                f"no end within {self.limit_s} s\n--- stacks\n{stacks}\n--- out\n{out}\n--- err\n{err}"
            ) from None
        seconds = time.monotonic() - self._begun
        if clean:
            self.look_for_rests()
        return Done(self.process.returncode, *self.text(), seconds)

    def stacks(self) -> str:
        """Return the stacks of its processes."""
        return "\n".join(_stack(pid) for pid in self.left())

    def look_for_rests(self) -> None:
        """Look for what it left behind: processes, shared memory, files."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if left:
            stacks = self.stacks()
            self._kill()
            raise AssertionError(f"processes left behind: {left}\n{stacks}\n{self.text()[1]}")
        seen = _shared_memory(self._own_memory) if self._own_memory else _shared_memory(SHARED_MEMORY) - self._shared
        assert not seen, f"left in /dev/shm: {seen}\n{self.text()[1]}"
        # Open MPI leaves the folder of its session when a shell started the first process; launchers remove theirs.
        temporary = (
            path for top in self._temporary.glob("*") if not top.name.startswith("ompi.") for path in (top, *top.rglob("*"))
        )
        rests = [*temporary, *(path for run in _runs(self._folder) for path in unfinished(run))]
        assert not rests, f"files left behind: {', '.join(map(str, rests))}\n{self.text()[1]}"

    def _kill(self) -> None:
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def _runs(folder: Path) -> list[Path]:
    """Return the run directories in `folder`, and in ``runs/`` there."""
    return [path.parent for pattern in ("*/ranks", "runs/*/ranks") for path in folder.glob(pattern)]


def _stack(pid: int) -> str:
    beside = Path(sys.executable).parent / "py-spy"
    tool = beside if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return f"{pid}: no py-spy to show its stack"
    try:
        done = subprocess.run([tool, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return f"{pid}: no stack within 20 s"
    return done.stdout or f"{pid}: {done.stderr}"


def _shared_memory(folder: Path) -> set[str]:
    if folder != SHARED_MEMORY:
        return {path.name for path in folder.iterdir()}
    return {path.name for vendor in VENDORS for pattern in vendor.leaves_shared_memory for path in folder.glob(pattern)}


@functools.cache
def memories_apart() -> bool:
    """Tell whether each job can have a /dev/shm of its own, so that jobs side by side don't see each other's segments."""
    command = ["unshare", "--mount", "sh", "-c", OWN_MEMORY, str(SHARED_MEMORY), "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0
    except OSError:
        return False


def side_by_side() -> int:
    """Return how many jobs to run at a time: their ranks wait a good deal, so more than there are cores."""
    return 2 * (os.cpu_count() or 1) if memories_apart() else 1


def python() -> list[str]:
    """Return the command of this Python."""
    return [sys.executable]


def hpc_elastic(*arguments: object) -> list[str]:
    """Return a command line of the program."""
    return [sys.executable, "-m", "hpc_elastic.cli", *map(str, arguments)]


def mpiexec(n: int) -> list[str]:
    """Return the start of a command line under the launcher."""
    path, vendor = find_mpiexec()
    return [str(path), *vendor.launch, "-n", str(n), sys.executable]


def until(done, limit_s: float = 30.0) -> None:
    """Wait until `done()` is true; a job under way can only be watched."""
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.02)
