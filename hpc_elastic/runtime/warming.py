"""The leader's care for warm parents: what they import, and that its own host has one; agents see to those of companions."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from .. import warmth
from ..comm.starting import portable, without_session
from ..config import RUN_VARIABLE
from ..keeper import Keeper

if TYPE_CHECKING:
    from .leader import Leader


class Warming:
    """Sees to it that this host has a warm parent, as long as there may be newcomers.

    It ends by itself, when the run is over and nobody is left whom it has forked.

    Parameters
    ----------
    leader : Leader
        The leader.
    """

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._keeper = Keeper(str(leader.session.run.path))
        self._modules: dict[str, str] | None = None

    def look(self) -> None:
        """Start it where there is none; called at the turns that need a look."""
        if self._leader.session.config.warm == "off" or self._leader.office.max_ranks <= self._leader.world.size:
            return
        if self._modules is None:
            self._modules = warmth.preloadable(dict(sys.modules), warmth.outside())
            if self._worth():
                self._specify(self._modules)  # which gives those that could not serve the leader before another chance
        if self._worth() and self._keeper.due():
            self._specify(self._modules)
            problem = self._keeper.start()
            if problem:
                self._leader.reports.say(problem)

    def _worth(self) -> bool:
        """Tell whether it is wanted; and so much slower is the start of a process without."""
        return self._leader.session.config.warm == "on" or len(self._modules or ()) >= warmth.WORTH

    def _specify(self, modules: dict[str, str]) -> None:
        """Write down what is to be imported, and how: of now, as this process's variables may change."""
        run = self._leader.session.run
        environ = portable(without_session()) | {RUN_VARIABLE: str(run.path)}  # by which it is known to belong to the run
        command = [sys.executable, "-m", "hpc_elastic.warm", str(run.path)]
        path = self._leader.session.script.path
        spec = warmth.Spec(modules=modules, rehearsals=warmth.rehearsals, path=path, command=command, environ=environ)
        with contextlib.suppress(OSError):  # the keeper finds none, or that of before; the job needs neither
            run.put(run.path / "warm" / "spec.json", spec)
