"""What a round of `tests.chaos` does to its job: resizes, settings and troubles, all drawn from one seed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_elastic.config import FAULT_VARIABLE
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.faults import ROLES
from hpc_elastic.rundir import RunDirectory, Status

from .launch import Job

MOST_RANKS, SLOTS = 4, 5
IN_STEPS = ("point", "sum")  # passed at every step, so that a fault there needs a step
IN_CHECKPOINTS = ("copy", "snapshot", "write", "manifest")
IN_RESIZES = (
    *("request", "start", "warm", "spawn", "init", "gather"),
    *("drain", "merge", "sync", "redistribute", "split", "commit", "retire"),
)
IN_LOSSES = ("detect", "agree", "rebuild", "restore")
FAULTS = {
    "fault kill": "kill",
    "fault stop": "stop",
    "fault delay": "delay",
    "fault raise": "raise",
    "disk full": "disk-full",
}
WEIGHTS = {
    "fault kill": 10,
    "fault stop": 6,
    "fault delay": 6,
    "fault raise": 1,
    "disk full": 2,
    "rank killed": 5,
    "rank stopped": 4,
    "two ranks killed": 3,
    "any process killed": 3,
    "guard killed": 1,
    "launcher killed": 1,
    "rank told to leave": 2,
    "slots refused and taken back": 4,
}


@dataclass(frozen=True)
class Trouble:
    """One trouble: a fault, which the job finds in its environment, or something done to it from outside at a `step`."""

    kind: str
    text: str
    step: int = -1
    pick: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} ({self.text})" if self.text else f"{self.kind} at step {self.step}"

    @property
    def blows(self) -> int:
        """How many losses it can lead to at most, one after another."""
        return self.text.count(";") + 1


@dataclass(frozen=True)
class Round:
    """One round: options of ``hpc-elastic run``, and what is done to the job."""

    seed: int
    options: tuple[object, ...]
    restarts: int
    troubles: tuple[Trouble, ...]

    @classmethod
    def draw(cls, seed: int, steps: int, *, joins: bool) -> Round:
        """Draw a round of about `steps` steps; `joins` if newcomers can come with launchers of their own."""
        rng = random.Random(seed)
        kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=rng.choice([1, 1, 2, 2, 3]))
        troubles = tuple(_trouble(rng, kind, steps) for kind in dict.fromkeys(kinds))
        restarts = rng.choice([0, 1, 5, 5, 5, 5, 5])
        settings: dict[str, object] = {
            "ledger": "true",
            "stall_s": 2,
            "deadline_s": 20,
            "restarts": restarts,
            "checkpoint_steps": rng.randint(3, 25),
        }
        if any(trouble.kind.startswith("slots") for trouble in troubles):
            settings |= {"broker": "script", "supply": _supply(rng, steps)}
        if joins and rng.random() < 0.15:
            settings["arrival"] = "join"
        options = [*("--slots", SLOTS, "--max", MOST_RANKS, "--timetable", _timetable(rng, steps))]
        options += ["--hold"] if rng.random() < 0.1 else []
        options += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        return cls(seed, tuple(options), restarts, troubles)

    @property
    def environ(self) -> dict[str, str]:
        """What the job finds in its environment."""
        faults = [trouble.text for trouble in self.troubles if trouble.kind in FAULTS]
        return {FAULT_VARIABLE: ";".join(faults)} if faults else {}

    def disturb(self, job: Job, run: Path) -> list[str]:
        """Do from outside what is to be done, each at its step; return what was done when that is over."""
        done: list[str] = []
        for trouble in sorted((t for t in self.troubles if t.kind in DEEDS), key=lambda trouble: trouble.step):
            status = None
            while status is None or status.state != "running" or status.step < trouble.step:
                if job.process.poll() is not None or job.seconds() > job.limit_s:
                    return done
                time.sleep(0.02)
                with contextlib.suppress(RunDirectoryError):
                    status = RunDirectory(run).status()
            time.sleep(trouble.pick / 10)
            for pid, number in DEEDS[trouble.kind](job, status, trouble.pick):
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
                    os.kill(pid, number)
                    done.append(f"{signal.Signals(number).name} to {pid} at step {status.step}: {command}")
        return done


def _timetable(rng: random.Random, steps: int) -> str:
    entries, size, step = [], 1, rng.randint(1, 5)
    while step < steps - 20:
        ranks = rng.choice([n for n in (1, 2, 2, 3, 3, 4, 4) if n != size or size > 1])
        leavers = (
            rng.sample(range(size), max(1, size - ranks)) if ranks == size or (ranks < size and rng.random() < 0.5) else []
        )
        entries.append(f"{step}:{ranks}" + ("-" + "+".join(map(str, sorted(leavers))) if leavers else ""))
        size, step = ranks, step + rng.randint(15, 60)
    return ",".join(entries)


def _supply(rng: random.Random, steps: int) -> str:
    changes = sorted(rng.sample(range(1, steps), rng.randint(2, 6)))
    return ",".join(["0:2", *(f"{step}:{rng.randint(1, SLOTS)}" for step in changes)])


def _trouble(rng: random.Random, kind: str, steps: int) -> Trouble:
    step = rng.randint(2 if rng.random() < 0.2 else 50, steps - 10)  # at first there is one rank, or few
    if kind not in FAULTS:
        return Trouble(kind, "", step, rng.random())
    action = f"delay={rng.choice([0.05, 0.5, 1, 3])}" if kind == "fault delay" else FAULTS[kind]
    groups = [IN_CHECKPOINTS[2:]] if kind == "disk full" else [IN_STEPS, IN_CHECKPOINTS, IN_RESIZES, IN_RESIZES, IN_LOSSES]
    stages = rng.choice(groups)
    parts = [rng.choice(stages), action]
    if stages is IN_STEPS:
        parts.append(f"step={step}")
    elif stages is not IN_LOSSES:
        parts.extend([f"gen={rng.randint(0, 3)}"] if rng.random() < 0.3 else [])
    if rng.random() < 0.6:
        parts.append(rng.choice([f"rank={rng.randint(0, 2)}", f"role={rng.choice(ROLES)}", f"member={rng.randint(0, 4)}"]))
    before = f"sum:kill:rank=1:step={step};" if stages is IN_LOSSES else ""
    return Trouble(kind, before + ":".join(parts))


# --- deeds ----------------------------------------------------------------------------------------------------------------

Deed = Callable[[Job, Status, float], list[tuple[int, int]]]  # which processes get which signals


def _to_members(n: int, number: int) -> Deed:
    def deed(_job: Job, status: Status, pick: float) -> list[tuple[int, int]]:
        first = int(pick * len(status.members))
        return [(member.pid, number) for member in (*status.members[first:], *status.members[:first])[:n]]

    return deed


def _kill_any(job: Job, _status: Status, pick: float) -> list[tuple[int, int]]:
    others = sorted(set(job.left()) - {job.process.pid})
    return [(others[int(pick * len(others))], signal.SIGKILL)] if others else []


def _kill_guard(_job: Job, status: Status, pick: float) -> list[tuple[int, int]]:
    rank = status.members[int(pick * len(status.members))].pid
    return [(guard, signal.SIGKILL) for guard in [_parent(rank)] if guard > 1]


def _kill_launcher(job: Job, _status: Status, _pick: float) -> list[tuple[int, int]]:
    return [(pid, signal.SIGKILL) for pid in job.left() if _parent(pid) == job.process.pid]


def _parent(pid: int) -> int:
    """Return the parent of process `pid`, or 0 if there is none any more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


DEEDS: dict[str, Deed] = {
    "rank killed": _to_members(1, signal.SIGKILL),
    "rank stopped": _to_members(1, signal.SIGSTOP),
    "two ranks killed": _to_members(2, signal.SIGKILL),
    "rank told to leave": _to_members(1, signal.SIGTERM),
    "any process killed": _kill_any,
    "guard killed": _kill_guard,
    "launcher killed": _kill_launcher,
}
