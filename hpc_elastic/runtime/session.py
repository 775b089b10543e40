"""What one process of a job knows of its run: settings, run directory, script; and how the job's failure reaches it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..config import RUN_VARIABLE, Config, build, from_environment, settings
from ..errors import ConfigError, LostRank, RankError, Retired, RunDirectoryError
from ..model import Member
from ..rundir import RankRecord, RunDirectory

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


OVER = ("ended", "stopped")  # states of a job that needs no ranks any more
DOZE_S = 0.05


@dataclass(frozen=True)
class Script:
    """How to run the user's script again in a newcomer."""

    argv: list[str]
    module: str
    path: list[str]
    directory: str

    @classmethod
    def running(cls) -> Script:
        """Return the script that runs in this process."""
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        if file is None:
            raise ConfigError("he.run needs a script file or a module that newcomers can run; it can't run from a prompt")
        module = "" if spec is None else spec.name.removesuffix(".__main__")
        argv = [str(Path(file).absolute()), *sys.argv[1:]]
        return cls(argv, module, list(sys.path), str(Path.cwd()))

    @property
    def name(self) -> str:
        """Short name, for run directories and messages."""
        return self.module or Path(self.argv[0]).stem


@dataclass
class Session:
    """One process's part of a run.

    `began` is when it began to warm up, by its clock; `checkpoint` what the run begins with; `how` a newcomer was started,
    and `start_s` how long that took until it began.
    """

    config: Config
    run: RunDirectory
    script: Script
    started: float
    clock: Callable[[], float] = time.perf_counter
    began: float = field(default_factory=time.perf_counter)
    checkpoint: Checkpoint | None = None
    how: str = ""
    start_s: float = 0.0

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.time() - self.started

    def check(self) -> None:
        """Raise what the job failed with, if it has failed."""
        if self.run.failed():
            failure = self.run.failure()
            if failure is None:
                raise RunDirectoryError(f"run directory {self.run.path} is gone")
            raise (LostRank if failure.kind == "lost" else RankError)(failure.error)

    def doze(self) -> None:
        """Sleep a little in a rank that is parked.

        Raises
        ------
        Retired
            If the job has ended.
        """
        time.sleep(DOZE_S)
        self.check()
        status = self.run.status()
        if status is not None and status.state in OVER:
            raise Retired("the job ended while this rank was parked")

    def record(self, member: Member, outcome: str, error: str = "") -> None:
        """Write this process's record."""
        self.run.put_record(
            RankRecord(member=member, outcome=outcome, time=time.time(), error=error, peak_bytes=peak_bytes())
        )


def peak_bytes() -> int:
    """Return the most memory that this process had resident, in bytes (``VmHWM`` in proc(5))."""
    with Path("/proc/self/status").open(encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def seed_config(given: dict[str, Any]) -> Config:
    """Return the settings of a seed rank: those in the script below those of the environment and of the supervisor."""
    run = os.environ.get(RUN_VARIABLE)
    if run:
        ready = RunDirectory(Path(run)).get(Path(run) / "config.json", dict[str, Any]) or {}
        return build(given, ready)
    return build(given, from_environment(os.environ))


def open_run(config: Config, script: Script) -> RunDirectory:
    """Return the run directory: the supervisor's, the one configured, or a new one below ``runs/``."""
    run = os.environ.get(RUN_VARIABLE)
    if run:
        return RunDirectory(Path(run))
    if config.run_dir:
        return RunDirectory.create(Path(config.run_dir))
    return RunDirectory.create_below(Path("runs"), script.name.rsplit(".", 1)[-1])


def packed(config: Config) -> dict[str, Any]:
    """Return the settings as newcomers get them."""
    return settings(config)


def unpacked(values: dict[str, Any]) -> Config:
    """Return the settings that `packed` gave."""
    return msgspec.convert(values, Config)
