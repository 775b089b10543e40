"""Where things are, for all who have to find them: run directories, and what has a place of its own in or beside one."""

from __future__ import annotations

import time
from pathlib import Path

from .config import Config
from .errors import RunDirectoryError
from .model import OWN

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (where POSIX shared memory is; also that of the MPIs)
SHARED_PREFIX = "hpc_elastic-"


def shared_memory(name: str) -> Path:
    """Return the file in memory that processes of one host share under `name`."""
    return SHARED_MEMORY / f"{SHARED_PREFIX}{name}"


def shared_files() -> list[Path]:
    """Return all such files that there are on this host, whoever's."""
    return list(SHARED_MEMORY.glob(f"{SHARED_PREFIX}*"))


def checkpoint_folder(config: Config, run_path: Path) -> Path:
    """Return the folder for the checkpoints of the run in `run_path`."""
    return Path(config.checkpoint_dir) / run_path.name if config.checkpoint_dir else run_path / "checkpoints"


def unused_below(parent: Path, name: str) -> Path:
    """Return the path of a new run directory below `parent`: `name` with the time of day."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(1000):
        path = parent / (f"{stem}-{attempt}" if attempt else stem)
        if not path.exists():
            return path
    raise RunDirectoryError(f"{parent} is full of runs named {stem}: name one with --run-dir")


def companion_name(companion: int) -> str:
    """Return the name of a companion's files."""
    return "own" if companion == OWN else str(companion)


def companion_file(run_path: Path, companion: int, kind: str) -> Path:
    """Return where the agent of a companion says something: see `hpc_elastic.agent`."""
    return run_path / "companions" / f"{companion_name(companion)}.{kind}"


def order_file(run_path: Path, companion: int, member: int) -> Path:
    """Return where the agent of a companion is told to start newcomer `member`."""
    return run_path / "companions" / companion_name(companion) / f"{member}.json"
