"""What the survivors of a loss agree on: a pure function of their accounts.

Points and sums alternate: place 2p is resize point p, place 2p+1 the sum of the step that follows it. A word other than
"nothing" is followed by a barrier, and so is a sum before it is handed to the user. So no rank is past a place whose outcome
another one lacks, except for a word of nothing, and that can be told from the places alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from ..model import Member

NOTHING, RESIZE, STOP, END, CHECKPOINT, COPY = range(6)
UNKNOWN = -1


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Where one survivor stands.

    Attributes
    ----------
    members : tuple of Member
        Its generation, number `generation`, in the order of the ranks.
    joining : tuple of Member
        Newcomers of the resize that it is in the midst of.
    place : int
        2p at resize point p, 2p+1 in the sum after it.
    ready : bool
        It lacks nothing of what its place gives, the sum or the next generation, and waits for the others only.
    word : int
        Word of the last point, `UNKNOWN` if it has not come.
    step : int
        Steps done.
    needs_all : str
        Why the job can't go on here without a lost member; empty if it can.
    unwound : str
        Why this rank can't go on from where it was, whoever was lost; empty if it can.
    """

    member: Member
    generation: int
    members: tuple[Member, ...]
    place: int
    ready: bool
    word: int
    step: int
    joining: tuple[Member, ...] = ()
    needs_all: str = ""
    unwound: str = ""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How the survivors go on.

    Attributes
    ----------
    generation : int
        Number of the generation that goes on, without the `lost`; the next number is that of the one to come.
    survivors : tuple of Member
        The new generation, in the order of the ranks.
    lost : tuple of Member
        Members that are no more.
    dismissed : tuple of Member
        Newcomers of a resize that is rolled back.
    point, word : int
        The furthest point reached and its word; the words of earlier points are nothing.
    redo : int
        Place of a sum that has to be done anew, or `UNKNOWN`.
    refused : str
        Why the job can't go on from where it is; empty if it can.
    """

    generation: int
    survivors: tuple[Member, ...]
    lost: tuple[Member, ...]
    dismissed: tuple[Member, ...]
    point: int
    word: int
    redo: int
    step: int
    refused: str = ""


def awaited(accounts: Collection[Account], gone: Collection[int]) -> list[Member]:
    """Return who has to give an account still: all members, and newcomers where a resize is committed."""
    newest = max(account.generation for account in accounts)
    people = {member.id: member for account in accounts for member in account.members}
    people |= {member.id: member for account in accounts if account.generation < newest for member in account.joining}
    known = {account.member.id for account in accounts}
    return [member for number, member in sorted(people.items()) if number not in known and number not in gone]


def judge(accounts: Sequence[Account], gone: Collection[int], left: Collection[int] = ()) -> Verdict:
    """Return the verdict on the `accounts` of all survivors; `gone` are the numbers of processes that have ended.

    Those of them that `left` by themselves are not lost.

    A resize is committed if a member is past it, else rolled back: its newcomers are sent away, and its members go on in
    the generation before.
    """
    newest = max(account.generation for account in accounts)
    inside = [account for account in accounts if account.member in account.members]
    if not inside:  # only newcomers are left, who hold nothing
        nobody, called = accounts[0].members, accounts[0].joining
        return Verdict(
            generation=newest,
            survivors=(),
            lost=nobody,
            dismissed=called,
            point=-1,
            word=UNKNOWN,
            redo=UNKNOWN,
            step=0,
        )
    members = next(account.members for account in inside if account.generation == newest)
    within = {member.id for member in members}
    own = [account for account in accounts if account.member.id in within]
    survivors = tuple(member for member in members if member.id not in gone)
    lost = tuple(member for member in members if member.id in gone and member.id not in left)
    joining = {member.id: member for account in accounts if account.generation == newest for member in account.joining}
    place = max(account.place for account in own)
    words = {account.word for account in own if account.place // 2 == place // 2} - {UNKNOWN}
    words.discard(RESIZE)  # to be decided anew, or behind those that are to go on
    unfinished = [account.place for account in own if account.place % 2 and not account.ready]
    reasons = [account.needs_all for account in own if account.needs_all and lost]
    # Even if only a newcomer was lost: the others can't go on from where such a rank no longer is.
    reasons += [account.unwound for account in own if account.unwound]
    return Verdict(
        generation=newest,
        survivors=survivors,
        lost=lost,
        dismissed=tuple(joining.values()),
        point=place // 2,
        word=words.pop() if words else UNKNOWN,
        redo=max(unfinished, default=UNKNOWN),
        step=max(account.step for account in own),
        refused=reasons[0] if reasons else "",
    )
