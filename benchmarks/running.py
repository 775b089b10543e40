"""A job under ``hpc-elastic run`` that is measured from outside: by its events, and by the stamps of its ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from hpc_elastic import events, leftovers
from hpc_elastic.comm.vendor import prepare
from hpc_elastic.rundir import RunDirectory, Status

from .record import cannot
from .work import ROW

E = TypeVar("E", bound=events.Event)

LOOK_S = 0.02
END_S = 30.0
LIMIT_S = 300.0  # of a job that measures by itself
PROGRAM = [sys.executable, "-m", "hpc_elastic.cli"]


def measured(command: Sequence[str], file: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """Run a job that writes what it measures into `file`, and return that; end the benchmark if it fails."""
    own = {**os.environ, **environ, "OMP_NUM_THREADS": "1", "HPC_ELASTIC_PROGRESS": "off"}
    own["HPC_ELASTIC_RUN_DIR"] = str(file.with_name("run"))
    prepare(own)
    unwind_when_told()
    with subprocess.Popen(command, env=own, cwd=file.parent, stdout=sys.stderr) as process:
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            cannot(f"the job did not end within {LIMIT_S:.0f} s")
        finally:
            process.terminate()  # does nothing if it has ended
    if code or not file.exists():
        cannot(f"the job ended with exit code {code}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def unwind_when_told() -> None:
    """End by an exception on SIGTERM, so that jobs under way are ended too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class BrokenError(Exception):
    """The job can't be measured: it has ended, or does not do what it should."""


class Running:
    """A job under way. Use as a context manager: it is ended when the block is left, and its folder kept on an error.

    Parameters
    ----------
    options : list of str
        Options of ``hpc-elastic run``.
    script : str
        Script in this package.
    first, others : object
        Its arguments; the folder for the stamps is put in behind the first.
    parent : Path, optional
        Where its folder is made.
    under : sequence of str
        Command that it is run by.
    environ : mapping, optional
        More of its environment.
    look_s : float
        Time between looks at it, which cost it something on a machine of few cores.
    """

    def __init__(
        self,
        options: list[str],
        script: str,
        first: str,
        *others: object,
        parent: Path | None = None,
        under: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        unwind_when_told()
        self._look_s = look_s
        self._folder = folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
        self._stamps = folder / "stamps"
        self._stamps.mkdir()
        self._path = folder / "run"
        # A rank has one core: BLAS must not start threads for all of them. And a newcomer must not compile all modules anew.
        own = {**os.environ, **(environ or {}), "OMP_NUM_THREADS": "1"}
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        ours = ["--run-dir", str(self._path), "--progress", "off", *options]
        arguments = [str(Path(__file__).parent / script), first, str(self._stamps), *map(str, others)]
        self.process = subprocess.Popen([*under, *PROGRAM, "run", *ours, *arguments], stdout=sys.stderr, env=own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            for _ in range(2):  # the second one ends it at once
                self.process.terminate()
                time.sleep(0.2)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                leftovers.remove(self._path, 0.0)
        if kind is None:
            shutil.rmtree(self._folder)
        else:
            print(f"kept: {self._folder}", file=sys.stderr)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._path

    @property
    def stamps(self) -> Path:
        """The folder for what its ranks write."""
        return self._stamps

    # --- what it shows ------------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, np.ndarray]:
        """Return the steps that each process has finished so far, by the processes' names."""
        files = (file for file in self._stamps.iterdir() if not file.suffix)
        return {file.name: np.frombuffer(_whole(file.read_bytes()), ROW) for file in files}

    def began(self, process: str) -> dict[str, float]:
        """Return when the stages of a process's beginning were."""
        return json.loads((self._stamps / f"{process}.json").read_text())

    def happened(self, kind: type[E], since: float = 0.0) -> list[E]:
        """Return the events of a `kind` after the time `since`."""
        found = events.read(self._path / "events.jsonl")
        return [event for event in found if isinstance(event, kind) and event.time > since]

    def status(self) -> Status:
        """Return the status."""
        status = RunDirectory(self._path).status()
        assert status is not None
        return status

    def steady(self, ranks: int, steps: int, since: float = 0.0) -> bool:
        """Tell whether `ranks` processes are alone and have finished `steps` steps together after the time `since`."""
        late = [rows[rows["time"] > since] for rows in self.rows().values()]
        late = [rows for rows in late if len(rows)]
        if not late:
            return False
        newest = max(rows["step"][-1] for rows in late)
        late = [rows for rows in late if rows["step"][-1] >= newest - 1]
        return len(late) == ranks and all((rows["size"] == ranks).sum() >= steps for rows in late)

    # --- what is done with it -----------------------------------------------------------------------------------------

    def until(self, done: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Return when `done()` is true.

        Raises
        ------
        BrokenError
            If the job ends before, or the limit is passed.
        """
        deadline = time.monotonic() + limit_s
        while not done():
            if self.process.poll() is not None:
                raise BrokenError(f"the job ended with exit code {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                raise BrokenError(f"{what}: not within {limit_s:.0f} s")
            time.sleep(self._look_s)

    def stop(self) -> None:
        """Stop it, and see that it ends well."""
        subprocess.run([*PROGRAM, "stop", str(self._path)], check=False, stdout=sys.stderr, stderr=sys.stderr)
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise BrokenError(f"the job did not stop within {END_S:.0f} s") from None
        if code:
            raise BrokenError(f"the job ended with exit code {code}")


def _whole(data: bytes) -> bytes:
    return data[: len(data) // ROW.itemsize * ROW.itemsize]
