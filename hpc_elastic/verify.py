"""Checkpoints as people want to see them: which there are, and whether they are good."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from . import events
from .checkpoint import Checkpoint, Store
from .config import build
from .errors import CheckpointError, RunDirectoryError
from .places import checkpoint_folder
from .rundir import RunDirectory


def examine(where: Path) -> list[dict[str, Any]]:
    """Read the checkpoints of the run `where`, of a folder of them, or one, oldest first; return what was found, for JSON.

    Raises
    ------
    RunDirectoryError
        If there is no such run or checkpoint.
    CheckpointError
        If the folder can't be read.
    """
    if not where.exists():
        raise RunDirectoryError(f"{where} does not exist: name a run directory or a checkpoint")
    folder = folder_of(RunDirectory(where)) if (where / "ranks").is_dir() else where
    found = Store(folder).all()
    return [_examined(path) for path in (found if found or folder != where else [where])]


def folder_of(run: RunDirectory) -> Path:
    """Return where the checkpoints of `run` are: as the job itself has said, or else as it was started."""
    launch = run.launch()
    settings = launch.settings if launch else {}
    for event in events.read(run.events):
        if isinstance(event, events.Started):
            settings = event.settings
    return Path(launch.directory if launch else "") / checkpoint_folder(build(settings), run.path)


def _examined(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(path), "loop": None, "step": None, "time": None}
    row["bytes"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError as error:
        return {**row, "problems": [str(error)]}
    about = checkpoint.about
    return {
        **row,
        "loop": about.loop,
        "step": about.cursor.step,
        "time": about.time,
        "problems": checkpoint.problems(),
    }


def table(found: list[dict[str, Any]]) -> None:
    """Print on stdout what `examine` returned."""
    if not found:
        return
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("checkpoint", "step", "size", "age", "state"):
        grid.add_column(name, no_wrap=name != "state", overflow="fold")
    now = time.time()
    for row in found:
        grid.add_row(
            Text(Path(row["path"]).name),
            "" if row["step"] is None else str(row["step"]),
            decimal(row["bytes"]),
            "" if row["time"] is None else _age(now - row["time"]),
            Text("; ".join(row["problems"]) or "good"),
        )
    Console(markup=False, highlight=False, soft_wrap=True).print(grid)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
