"""Which implementation is used here, and why."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from .commands import Commands
from .library import Library

if TYPE_CHECKING:
    from .calls import Calls
    from .reading import Slurm


class Choice(NamedTuple):
    """An implementation, and the reason for it."""

    slurm: Slurm
    reason: str


def series(release: str) -> str:
    """Return the part of a version that must be equal: ``"25.11"`` of ``"25.11.2"``."""
    return ".".join(release.split(".")[:2])


def choose(calls: Calls | None = None) -> Choice:
    """Return pyslurm's implementation where it imports and was built for this Slurm, else the commands'.

    Raises
    ------
    SlurmMissing, SlurmUnreachable
        If Slurm's commands are not here, or don't answer.
    """
    commands = Commands(calls)
    release = commands.release()
    try:
        pyslurm = importlib.import_module("pyslurm")
    except Exception as error:  # noqa: BLE001  (a library built for another Slurm fails in many ways when it is loaded)
        return Choice(commands, f"the commands of Slurm {release}: pyslurm can't be imported ({error})")
    built = str(getattr(pyslurm, "__version__", "?"))
    if series(built) != series(release):
        return Choice(commands, f"the commands of Slurm {release}: pyslurm {built} is made for another version")
    return Choice(Library(pyslurm, commands), f"pyslurm {built}, made for this Slurm {release}")
