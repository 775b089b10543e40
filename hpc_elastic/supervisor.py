"""The supervisor: makes the run directory, starts the seed rank under its guard, and ends as the job ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .comm.vendor import find_mpiexec, orphaned_shared_memory, prepare
from .config import RUN_VARIABLE, SUPERVISED_VARIABLE, build
from .errors import LaunchError, RunDirectoryError
from .progress import Progress
from .rundir import Failure, RunDirectory, Status

GUARD = Path(__file__).parent / "guard.py"
LOOK_S = 0.1
GRACE_S = 5.0
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NEVER_RAN, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class Supervisor:
    """One run of a script.

    Parameters
    ----------
    script : str
        Script file, or with `module` the name of a module.
    arguments : list of str
        Its arguments.
    given : dict
        The job's settings as given outside the script, which win over the script's own.
    """

    def __init__(self, script: str, arguments: list[str], given: dict[str, Any], *, module: bool = False) -> None:
        config = build(given)
        if not module and not Path(script).is_file():
            raise LaunchError(f"script {script} does not exist")
        self.mpiexec, self.vendor = find_mpiexec()
        stem = script.rsplit(".", 1)[-1] if module else Path(script).stem
        if config.run_dir:
            self.run = RunDirectory.create(Path(config.run_dir))
        else:
            self.run = RunDirectory.create_below(Path("runs"), stem)
        self.config = config
        self._given = {key: value for key, value in msgspec.to_builtins(config).items() if key in given}
        self._target = ["-m", script, *arguments] if module else [script, *arguments]
        self._name = script

    def command(self) -> list[str]:
        """Return the command that starts the seed rank."""
        # The guard's own interpreter needs neither site-packages nor the environment's Python settings.
        guard = [sys.executable, "-I", "-S", str(GUARD), str(self.run.path), "0"]
        return [str(self.mpiexec), *self.vendor.launch, "-n", "1", *guard, sys.executable, *self._target]

    def go(self) -> int:
        """Run the job to its end and return the exit code."""
        environ = dict(os.environ)
        prepare(environ)
        environ[RUN_VARIABLE] = str(self.run.path)
        environ[SUPERVISED_VARIABLE] = "1"
        self._write_settings()
        progress = Progress(Progress.mode(self.config.progress))
        begun = time.time()
        process = subprocess.Popen(self.command(), env=environ, start_new_session=True)
        interrupted = _Interrupts(lambda name: self._interrupt(process, name))
        try:
            while process.poll() is None:
                with contextlib.suppress(RunDirectoryError):  # it can be on a file system that has a bad moment
                    status = self.run.status()
                    if status is not None:
                        progress.show(status)
                time.sleep(LOOK_S)
            last = self.run.status()
            if last is not None:
                progress.show(last)
        finally:
            progress.close()
            interrupted.restore()
            _end_group(process)
            for segment in orphaned_shared_memory(begun):
                segment.unlink(missing_ok=True)
        return EXIT_INTERRUPTED if interrupted.seen else self._verdict(last, process.returncode)

    def _interrupt(self, process: subprocess.Popen[bytes], name: str) -> None:
        """End the job because a person or the system asked for it."""
        host = os.uname().nodename
        error = f"interrupted: the supervisor on {host} received {name}"
        self.run.fail(Failure(error=error, traceback="", member=-1, rank=-1, host=host, generation=-1, step=-1))
        _end_group(process)

    def _write_settings(self) -> None:
        self.run.put(self.run.path / "config.json", self._given)

    def _verdict(self, last: Status | None, code: int) -> int:
        """Return the exit code; the run's own record decides, since launchers end with what they like."""
        failure = self.run.failure()
        if failure is not None:
            told = "" if failure.told else f"hpc_elastic: {failure.error}\n"  # else the rank has said it
            sys.stderr.write(f"{told}hpc_elastic: run directory {self.run.path}\n")
            return EXIT_FAILED
        if last is not None and last.state in ("ended", "stopped"):
            return EXIT_OK
        if not self.run.records() and code == 0:
            self.run.remove_unused()
            sys.stderr.write(f"hpc_elastic: {self._name} ended without calling he.run(train): nothing was run\n")
            return EXIT_NEVER_RAN
        sys.stderr.write(
            f"hpc_elastic: the job ended early (the launcher ended with {code}); run directory {self.run.path}\n"
        )
        return EXIT_FAILED


class _Interrupts:
    """Passes SIGINT and SIGTERM on as an end of the job."""

    def __init__(self, end: Callable[[str], None]) -> None:
        self.seen = False
        self._end = end
        self._before = {number: signal.signal(number, self._handle) for number in CAUGHT}

    def _handle(self, number: int, _frame: Any) -> None:
        self.seen = True
        self._end(signal.Signals(number).name)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and whatever is left of its session's process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + GRACE_S
        while number == signal.SIGTERM and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
