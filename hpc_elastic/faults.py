"""Fault points: where tests let a stage fail on purpose. Without ``HPC_ELASTIC_FAULT`` they are an empty function.

    HPC_ELASTIC_FAULT="merge:kill:rank=1:gen=3"     at stage merge, rank 1 of generation 3 is killed
    HPC_ELASTIC_FAULT="sum:stop:step=20;warm:delay=2:member=2"

A fault is STAGE:ACTION, followed by what must hold for it to happen. Actions: ``kill`` and ``stop`` (SIGKILL and SIGSTOP to
the process itself), ``delay=SECONDS``, ``raise``, ``disk-full``. Conditions: ``rank``, ``member``, ``gen``, ``step`` and
``role`` (leader, other, newcomer). Each fault happens once in a run, however many processes pass its stage.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import FAULT_VARIABLE as VARIABLE
from .errors import ConfigError, JobError

STAGES = (
    *(
        "request",
        "start",
        "warm",
        "spawn",
        "init",
        "gather",
        "drain",
        "merge",
        "sync",
        "redistribute",
        "split",
        "commit",
        "retire",
    ),
    *("point", "sum", "detect", "agree", "rebuild", "restore", "copy", "snapshot", "write", "manifest", "end"),
)
ACTIONS = ("kill", "stop", "delay", "raise", "disk-full")
NUMBERS = ("rank", "member", "gen", "step")
ROLES = ("leader", "other", "newcomer")


@dataclass(frozen=True)
class Fault:
    """One fault: what happens, where, and under which conditions."""

    text: str
    stage: str
    action: str
    delay_s: float
    conditions: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that `text` writes; `ConfigError` if it is none."""
        stage, action, *rest = f"{text.strip()}:".split(":")[: max(2, text.count(":") + 1)]
        action, _, seconds = action.partition("=")
        conditions = dict(part.partition("=")[::2] for part in rest)
        good = stage in STAGES and action in ACTIONS and (action == "delay") == bool(seconds)
        good = good and all(value.isdecimal() if key in NUMBERS else key == "role" for key, value in conditions.items())
        try:
            delay_s = float(seconds or 0)
            good = good and 0 <= delay_s < float("inf")
        except ValueError:
            good = False
        if not good or conditions.get("role", ROLES[0]) not in ROLES:
            raise ConfigError(
                f"{VARIABLE}: {text!r} is not STAGE:ACTION[:CONDITION=VALUE]…; stages: {', '.join(STAGES)}; actions: "
                f"kill, stop, delay=SECONDS, raise, disk-full; conditions: {', '.join(NUMBERS)}, role={'|'.join(ROLES)}"
            )
        return cls(text.strip(), stage, action, delay_s, conditions)

    def matches(self, stage: str, facts: Mapping[str, object]) -> bool:
        """Tell whether it is meant for this `stage` under these `facts`."""
        return stage == self.stage and all(str(facts.get(key)) == value for key, value in self.conditions.items())

    def happen(self) -> None:
        """Do it, in this process."""
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "delay":
            time.sleep(self.delay_s)
        elif self.action == "disk-full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault {self.text})")
        else:
            raise JobError(f"fault {self.text}")


def parse(text: str) -> tuple[Fault, ...]:
    """Return the faults in `text`, which stand between semicolons."""
    return tuple(Fault.parse(part) for part in text.split(";") if part.strip())


@dataclass
class Faults:
    """The faults of this process: it knows which stage the process is in, and which faults have happened in the run.

    Parameters
    ----------
    faults : tuple of Fault
        What may happen.
    folder : Path
        Where a file for each fault that has happened keeps it from happening again.
    facts : callable
        Returns what conditions are compared with.
    """

    faults: tuple[Fault, ...]
    folder: Path
    facts: Callable[[], Mapping[str, object]]

    def at(self, stage: str) -> None:
        """Let the faults of `stage` happen that are meant for this process and have not happened yet."""
        for number, fault in enumerate(self.faults):
            if fault.matches(stage, self.facts()) and self._first(number):
                fault.happen()

    def _first(self, number: int) -> bool:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        try:
            os.close(os.open(self.folder / str(number), os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True


def _nothing(_stage: str) -> None:
    pass


at: Callable[[str], None] = _nothing  # called as faults.at("merge"), so that `arm` reaches everybody


def arm(folder: Path, facts: Callable[[], Mapping[str, object]]) -> None:
    """Make the fault points of this process real if ``HPC_ELASTIC_FAULT`` is set."""
    global at  # noqa: PLW0603  (a module that is a switch)
    text = os.environ.get(VARIABLE, "")
    if text:
        at = Faults(parse(text), folder, facts).at
