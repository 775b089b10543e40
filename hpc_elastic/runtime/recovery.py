"""How the survivors of a loss come together: each writes its account, one judges, all follow; then a new communicator.

It goes through files, since MPI has no way to tell who is left. The survivor with the lowest number judges. Should two hold
themselves for that one, the first to write the verdict wins.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import faults
from ..errors import JobError, LostRank
from ..model import Generation, Member
from ..rundir import RunDirectory
from .agreement import Account, Verdict, awaited, judge
from .reports import Here, await_ends
from .vigil import Vigil

if TYPE_CHECKING:
    from ..comm.world import World
    from .transition import Transition

VERDICT = "verdict.json"
JUDGED_S = 0.0005  # pause between looks: the survivors of one host agree within milliseconds
LONGEST_PAUSE_S = 0.02
MOST_LOSSES_AT_A_STEP = 3


class Meeting:
    """The survivors of one loss.

    Parameters
    ----------
    run : RunDirectory
        The run.
    vigil : Vigil
        Who lives.
    deadline_s : float
        How long a survivor that does not come is waited for.
    """

    def __init__(self, run: RunDirectory, vigil: Vigil, deadline_s: float) -> None:
        self._run = run
        self._vigil = vigil
        self._folder = vigil.meeting()
        self._deadline_s = deadline_s

    def agree(self, account: Account, check: Callable[[], None]) -> Verdict:
        """Give the own `account`, wait for the others', and return the verdict.

        Raises
        ------
        LostRank
            If a survivor does not come in time.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        faults.at("agree")
        self._run.put(self._folder / f"{account.member.id}.json", account)
        verdicts: list[Verdict] = []

        def judged() -> bool:
            verdict = self._run.get(self._folder / VERDICT, Verdict)
            if verdict is None:
                verdict = self._judge(account)
            if verdict is not None:
                verdicts.append(verdict)
            return verdict is not None

        begun, pause = time.monotonic(), JUDGED_S
        while not judged():
            check()
            waited = time.monotonic() - begun
            if waited > self._deadline_s:
                raise LostRank(
                    f"not all survivors of a loss were there within {waited:.0f} s: one may be in a call of its own"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        verdict = verdicts[0]
        self._vigil.losses += 1
        return verdict

    def _judge(self, own: Account) -> Verdict | None:
        """Return the verdict if this process is the one to judge and all accounts are there."""
        accounts = [account for path in self._accounts() if (account := self._run.get(path, Account)) is not None]
        people = {member.id: member for account in accounts for member in (*account.members, *account.joining)}
        known = {account.member.id for account in accounts}
        gone = self._vigil.gone(people.values())
        left = {number for number in people.keys() - known if self._vigil.left(number)}
        gone |= left
        if own.member.id != min(account.member.id for account in accounts if account.member.id not in gone):
            return None
        if awaited(accounts, gone):
            return None
        verdict = judge([account for account in accounts if account.member.id not in gone], gone, left)
        self._first(verdict)
        return self._run.get(self._folder / VERDICT, Verdict)

    def _accounts(self) -> list[Path]:
        return [path for path in self._folder.glob("[0-9]*.json") if path.stem.isdecimal()]

    def _first(self, verdict: Verdict) -> None:
        beside = self._folder / f".verdict.{secrets.token_hex(8)}"
        self._run.put(beside, verdict)
        with contextlib.suppress(FileExistsError):
            os.link(beside, self._folder / VERDICT)
        beside.unlink()


def standing(world: World | None, moving: Transition | None) -> tuple[int, tuple[Member, ...]]:
    """Return number and members of the generation that this rank is in; a newcomer's is the one it is to join.

    Raises
    ------
    LostRank
        If it is in none.
    """
    if world is not None:
        return world.generation.number, world.generation.members
    plan = moving.plan if moving is not None else None
    if plan is None:
        raise LostRank("the leader was lost before this newcomer had joined")
    return plan.generation - 1, plan.members[: len(plan.members) - plan.joining]


def send_away(members: tuple[Member, ...], run: RunDirectory) -> None:
    """End newcomers of a resize that was rolled back: they may sit in a call of MPI's that nobody will join."""
    for member in members:
        run.condemn(member.id)
        if member.host == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


def generation_after(verdict: Verdict) -> Generation:
    """Return the generation that the survivors form."""
    return Generation(verdict.generation + 1, verdict.survivors)


def ranks_of(members: tuple[Member, ...], survivors: tuple[Member, ...]) -> list[int]:
    """Return the ranks of the `survivors` among `members`."""
    within = {member.id for member in survivors}
    return [rank for rank, member in enumerate(members) if member.id in within]


def needs_all(here: Here) -> str:
    """Return why the job can't go on from `here` without a lost member; empty if it can."""
    if here.arrays:
        return "it held a part of a distributed array"
    return "" if here.unit == "samples" else "the turns of job.loop can't be repeated"


def names(run: RunDirectory, verdict: Verdict) -> str:
    """Return who was lost and how, for people."""
    said = []
    await_ends(run, verdict.lost)
    for member in verdict.lost:
        end = run.end_of(member.id)
        said.append(f"process {member.id} (pid {member.pid} on {member.host}) {end.how() if end else 'was lost'}")
    return "; ".join(said)


class Toll:
    """Counts losses by step: where the same step is fatal again and again, the program itself ends its ranks."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._steps: list[int] = []

    def count(self, verdict: Verdict) -> None:
        """Count a loss.

        Raises
        ------
        JobError
            If it is the third at its step.
        """
        if verdict.lost:
            self._steps.append(verdict.step)
            if self._steps.count(verdict.step) >= MOST_LOSSES_AT_A_STEP:
                raise JobError(
                    f"{names(self._run, verdict)}: the {MOST_LOSSES_AT_A_STEP}rd process lost at step {verdict.step}; "
                    "the program itself seems to end them there"
                )
