"""The verdict on a loss: single cases, and random executions of the protocol with deaths at any moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic.model import Member
from hpc_elastic.runtime.agreement import CHECKPOINT, END, NOTHING, RESIZE, UNKNOWN, Account, awaited, judge
from hpc_elastic.runtime.place import Place

POINTS, MOST_DEATHS, MOST_TURNS = 6, 3, 5000
WORDS = (NOTHING, NOTHING, RESIZE, RESIZE, CHECKPOINT)


def member(number):
    return Member(number, 1000 + number, "host", number)


def members(*numbers):
    return tuple(map(member, numbers))


def account(number, within=(0, 1, 2), **other):
    given = {"generation": 4, "place": 8, "ready": False, "word": UNKNOWN, "step": 4, **other}
    return Account(member=member(number), members=members(*within), **given)


# --- single cases ---------------------------------------------------------------------------------------------------------


def test_a_word_that_one_has_is_known_to_all():
    verdict = judge([account(1), account(2, word=CHECKPOINT, ready=True)], {0})
    assert (verdict.survivors, verdict.lost) == (members(1, 2), members(0))
    assert (verdict.generation, verdict.point, verdict.word, verdict.redo) == (4, 4, CHECKPOINT, UNKNOWN)


def test_a_word_that_nobody_has_is_given_anew():
    assert judge([account(1), account(2)], {0}).word == UNKNOWN


def test_a_sum_that_one_lacks_is_done_anew():
    assert judge([account(1, place=9, word=NOTHING), account(2, place=9, word=NOTHING, ready=True)], {0}).redo == 9


def test_a_sum_that_all_have_is_not_done_anew():
    ready = [account(1, place=9, word=NOTHING, ready=True), account(2, place=10)]
    verdict = judge(ready, {0})
    assert (verdict.redo, verdict.point, verdict.word) == (UNKNOWN, 5, UNKNOWN)


def test_who_is_before_a_sum_learns_that_there_was_nothing():
    verdict = judge([account(1, place=9, word=NOTHING), account(2)], {0})
    assert (verdict.point, verdict.word, verdict.redo) == (4, NOTHING, 9)


def test_a_resize_that_nobody_is_past_is_rolled_back():
    moving = {"word": RESIZE, "joining": members(3), "ready": True}
    verdict = judge([account(1, **moving), account(2, **moving), account(3, **moving)], {0})
    assert (verdict.generation, verdict.survivors, verdict.dismissed) == (4, members(1, 2), members(3))
    assert verdict.word == UNKNOWN


def test_a_resize_that_one_is_past_is_committed():
    moving = {"word": RESIZE, "joining": members(3), "ready": True}
    past = account(1, (0, 1, 2, 3), generation=5, place=9, word=RESIZE)
    verdict = judge([past, account(2, **moving), account(3, **moving)], {0})
    assert (verdict.generation, verdict.survivors, verdict.dismissed) == (5, members(1, 2, 3), ())
    assert verdict.redo == 9


def test_a_rebuild_that_one_is_past_is_behind_all():
    """The next resize, in which that one is already, is rolled back, and its newcomers are not waited for."""
    past = account(1, (1, 2, 5), generation=5, word=RESIZE, joining=members(6))
    accounts = [past, account(2, (0, 1, 2, 5))]
    assert awaited(accounts, {0, 5}) == []
    verdict = judge(accounts, {0, 5})
    assert (verdict.generation, verdict.survivors, verdict.dismissed) == (5, members(1, 2), members(6))
    assert (verdict.word, verdict.lost) == (UNKNOWN, members(5))


def test_newcomers_alone_are_sent_away():
    moving = {"word": RESIZE, "joining": members(3, 4), "ready": True}
    verdict = judge([account(3, **moving), account(4, **moving)], {0, 1, 2})
    assert (verdict.survivors, verdict.dismissed) == ((), members(3, 4))


def test_what_others_can_not_replace_is_refused():
    assert judge([account(1, needs_all="its rows"), account(2, needs_all="its rows")], {0}).refused == "its rows"
    assert judge([account(n, needs_all="its rows") for n in range(3)], set()).refused == ""


def test_all_go_back_with_one_that_was_unwound():
    """Else it would begin again by itself, when only a newcomer was lost, while the others go on."""
    assert judge([account(0), account(1, unwound="it was in a halo"), account(2)], set()).refused == "it was in a halo"


@pytest.mark.parametrize(
    ("accounts", "gone", "expected"),
    [
        ([account(1)], {0}, [2]),
        ([account(1)], {0, 2}, []),
        ([account(1, joining=members(3)), account(2, joining=members(3))], {0}, []),
        ([account(1, joining=members(3)), account(2, (0, 1, 2, 3), generation=5)], {0}, [3]),
    ],
)
def test_awaited(accounts, gone, expected):
    assert awaited(accounts, gone) == list(members(*expected))


# --- random executions ----------------------------------------------------------------------------------------------------


class Lost(Exception):  # noqa: N818
    """What `comm.waiting.Lost` is."""


@dataclass(eq=False)
class Comm:
    """A communicator: its collectives are matched by their order, and all have to call the same ones."""

    number: int
    members: tuple[int, ...]
    calls: dict[int, dict[int, object]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)

    def call(self, rank: int, label: object, *, root: int | None = None) -> Callable[[], bool]:
        """Call a collective, and return what tells that it is done here."""
        at = self.done.get(rank, 0)
        self.done[rank] = at + 1
        there = self.calls.setdefault(at, {})
        for other, called in there.items():
            assert called[0] == label[0], f"ranks diverge: {rank} calls {label}, {other} called {called}"
        there[rank] = label
        needed = self.members if root is None else (root,)
        return lambda: all(other in there for other in needed)

    def said(self, rank: int, root: int) -> object:
        """Return what `root` said in the last collective of `rank`."""
        return self.calls[self.done[rank] - 1][root][1]


@dataclass
class Meeting:
    """The folder of one loss."""

    accounts: dict[int, Account] = field(default_factory=dict)
    verdict: object = None


@dataclass(eq=False)
class Moving:
    """A resize, as one rank carries it out."""

    plan: tuple[tuple[int, ...], tuple[int, ...], int, int] | None = None  # joining, leavers, point, losses
    merged: Comm | None = None
    settled: Comm | None = None
    prepared: bool = False


Turns = Generator[tuple[bool, Callable[[], bool]], None, object]


class Rank:
    """One rank: what `runtime.membership` does, as far as others can tell; its place is the real one."""

    def __init__(self, job: Simulation, number: int, world: Comm | None) -> None:
        self.job, self.number, self.world = job, number, world
        self.alive, self.over, self.fate = True, False, ""
        self.place = Place()
        self.losses = 0 if world else -1
        self.watched = set(world.members) if world else {job.leader}
        self.moving, self.settled, self.fresh = None, None, None
        self.sums: list[int] = []
        self.turns = self.run()

    def bereft(self) -> bool:
        lost = any(not self.job.ranks[n].alive and not self.job.ranks[n].over for n in self.watched - {self.number})
        return lost or self.losses in self.job.meetings

    def wait(self, done) -> Turns:
        yield True, done

    def run(self) -> Turns:
        if self.world is None:
            yield from self.join()
            yield from self.step()
        while True:
            word = yield from self.pass_point()
            if self.world is None:
                return "left"
            if word == END:
                return "ended"
            yield from self.step()

    # --- points and sums

    def pass_point(self) -> Turns:
        self.place.at_point()
        while True:
            try:
                return (yield from self.at_point())
            except Lost:
                if (yield from self.recover()):
                    return RESIZE

    def at_point(self) -> Turns:
        word = self.place.foretold()
        if word != UNKNOWN:
            return word
        leader = self.world.members[0]
        order = self.job.order(self.world, self.place.point) if leader == self.number else None
        yield from self.wait(self.world.call(self.number, (f"word {self.place.point}", order), root=leader))
        self.place.word, plan = self.world.said(self.number, leader)
        if self.place.word == RESIZE:
            yield from self.resize(plan)
        elif self.place.word != NOTHING:
            self.place.ready = True
            yield from self.wait(self.world.call(self.number, (f"heard {self.place.point}",)))
        return self.place.word

    def step(self) -> Turns:
        while True:
            self.place.at_sum()
            try:
                yield from self.wait(self.world.call(self.number, (f"sum {self.place.point}",)))
                self.place.ready = True
                yield from self.wait(self.world.call(self.number, (f"summed {self.place.point}",)))
            except Lost:
                yield from self.recover()
                if self.place.again():
                    continue
            self.sums.append(self.place.point)
            return

    # --- resizes

    def resize(self, newcomers) -> Turns:
        moving = self.moving = Moving()
        leader = self.world.members[0]
        joining, leavers = newcomers
        plan = (joining, leavers, self.place.point, self.losses)
        yield from self.wait(self.world.call(self.number, ("plan", plan), root=leader))
        moving.plan = self.world.said(self.number, leader)
        self.watched |= set(joining)
        moving.merged = self.world
        if joining:
            yield from self.wait(self.world.call(self.number, ("before the merge",)))
            yield from self.merge(moving, self.world)
            if leader == self.number:
                self.job.told.update(dict.fromkeys(joining, (moving.plan, self.world)))
        yield from self.settle(moving)

    def merge(self, moving, world) -> Turns:
        joining = moving.plan[0]
        moving.merged = self.job.comm(("merged", world.number, joining), world.members + joining)
        yield from self.wait(moving.merged.call(self.number, ("merge",)))

    def settle(self, moving) -> Turns:
        merged, leavers = moving.merged, moving.plan[1]
        kept = tuple(n for n in merged.members if n not in leavers)
        moving.settled = merged
        if leavers:
            yield from self.wait(merged.call(self.number, ("before the split",)))
            yield from self.wait(merged.call(self.number, ("split",)))
            moving.settled = None if self.number in leavers else self.job.comm(("split", merged.number), kept)
        yield from self.wait(merged.call(self.number, ("before the commit",)))
        if moving.settled is not None:
            yield from self.wait(moving.settled.call(self.number, ("open",)))
        moving.prepared = True
        yield from self.wait(merged.call(self.number, ("commit",)))
        self.arrive(moving)

    def arrive(self, moving) -> None:
        base = self.generation()[0]
        self.moving, self.world = None, moving.settled
        self.watched = set(self.world.members) if self.world else set()
        if self.world is not None:
            self.job.numbers[self.world] = base + 1

    def generation(self):
        if self.world is not None:
            return self.job.numbers[self.world], self.world.members
        _, base = self.job.told[self.number]
        return self.job.numbers[base], base.members

    def join(self) -> Turns:
        moving = self.moving = Moving()
        told = self.job.told
        call = self.job.calls[self.number]
        moving.merged = self.job.comm(("merged", call[0].number, call[1]), call[0].members + call[1])
        yield from self.wait(moving.merged.call(self.number, ("merge",)))
        yield from self.wait(lambda: self.number in told)
        moving.plan = told[self.number][0]
        self.place.called_in(moving.plan[2], RESIZE)
        self.losses = moving.plan[3]
        self.watched = set(moving.merged.members)
        try:
            yield from self.settle(moving)
        except Lost:
            yield from self.recover()

    # --- losses

    def recover(self) -> Turns:
        committed = False
        while True:
            try:
                return (yield from self.meet()) or committed
            except Lost:
                committed = committed or (self.world is not None and self.world is self.settled)

    def meet(self) -> Turns:
        moving = self.moving
        number, within = self.generation()
        mine = Account(
            member=member(self.number),
            generation=number,
            members=members(*within),
            place=self.place.number,
            ready=moving.prepared if moving else self.place.ready,
            word=self.place.word,
            step=len(self.sums),
            joining=members(*moving.plan[0]) if moving and moving.plan else (),
        )
        meeting = self.job.meetings.setdefault(self.losses, Meeting())
        meeting.accounts[self.number] = mine
        yield False, lambda: meeting.verdict is not None or self.judges(meeting)
        if meeting.verdict is None:
            gone = self.job.gone()
            meeting.verdict = judge([a for n, a in meeting.accounts.items() if n not in gone], gone)
        verdict = meeting.verdict
        self.losses += 1
        self.moving = None
        self.place.agreed(verdict)
        committed = moving is not None and verdict.generation == number + 1
        if committed and moving.settled is None:
            self.world, self.watched = None, set()
            return True
        survivors = tuple(each.id for each in verdict.survivors)
        if self.number not in survivors:
            assert self.number in {each.id for each in verdict.dismissed}, f"{self.number} is left out: {verdict}"
            raise SystemExit
        if self.fresh is not None and verdict.generation == self.job.numbers[self.fresh]:
            self.world = self.fresh
        self.fresh = None
        if committed:
            self.world = self.settled = moving.settled
            self.job.numbers[self.world] = number + 1
        yield from self.rebuild(verdict, survivors)
        return committed

    def judges(self, meeting) -> bool:
        gone = self.job.gone()
        first = min(n for n in meeting.accounts if n not in gone)
        return first == self.number and not awaited(meeting.accounts.values(), gone)

    def rebuild(self, verdict, survivors) -> Turns:
        self.watched = set(survivors)
        if survivors[0] == self.number:
            self.job.send_away(survivors)
        world = self.job.comm(("rebuilt", self.world.number, self.losses), survivors)
        yield from self.wait(world.call(self.number, ("rebuild",)))
        self.job.numbers[world] = verdict.generation + 1
        self.fresh = world
        yield from self.wait(world.call(self.number, ("open",)))
        yield from self.wait(world.call(self.number, ("rebuilt",)))
        self.world, self.fresh = world, None


class Simulation:
    """A job whose ranks take turns at random, and die at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.comms: dict[object, Comm] = {}
        self.numbers: dict[Comm, int] = {}
        self.meetings: dict[int, Meeting] = {}
        self.told: dict[int, object] = {}
        self.calls: dict[int, tuple[Comm, tuple[int, ...]]] = {}
        self.orders: dict[tuple[Comm, int], object] = {}
        self.leader = 0
        first = self.comm("seeds", tuple(range(self.random.randint(2, 4))))
        self.numbers[first] = 0
        self.ranks = {n: Rank(self, n, first) for n in first.members}

    def comm(self, key, within) -> Comm:
        made = self.comms.setdefault(key, Comm(len(self.comms), within))
        assert made.members == within, f"{key} is made of {made.members} and of {within}"
        return made

    def gone(self) -> set[int]:
        return {n for n, rank in self.ranks.items() if not rank.alive}

    def send_away(self, survivors) -> None:
        """End newcomers of a resize that was rolled back, or called off before all had heard of it."""
        for rank in self.ranks.values():
            if rank.world is None and rank.number not in survivors and rank.number in self.calls:
                rank.alive = False

    def order(self, world: Comm, point: int):
        """Return the leader's word, and the newcomers and leavers of a resize."""
        word = END if point == POINTS else self.random.choice(WORDS)
        if word != RESIZE:
            return word, None
        grows, size = self.random.randint(0, 2), len(world.members)
        leaving = self.random.randint(0, size) if grows else self.random.randint(1, size) - 1
        if not grows and not leaving:
            return NOTHING, None
        leavers = tuple(self.random.sample(world.members, leaving))
        joining = tuple(range(len(self.ranks), len(self.ranks) + grows))
        self.leader = world.members[0]
        for n in joining:
            self.calls[n] = world, joining
            self.ranks[n] = Rank(self, n, None)
        return RESIZE, (joining, leavers)

    def run(self) -> None:
        """Let all come to their ends."""
        waiting: dict[int, tuple[bool, Callable[[], bool]]] = {}
        deaths = self.random.randint(0, MOST_DEATHS)
        for _ in range(MOST_TURNS):
            living = [rank for rank in self.ranks.values() if rank.alive]
            if not living:
                return
            if deaths and self.random.random() < 0.02:
                deaths -= 1
                self.random.choice(living).alive = False
                continue
            able = [rank for rank in living if rank.number not in waiting or self._can(rank, *waiting[rank.number])]
            assert able, f"nobody can go on: {[(r.number, r.place.number) for r in living]}"
            self._turn(self.random.choice(able), waiting)
        raise AssertionError("no end")

    def _can(self, rank: Rank, leaves: bool, done: Callable[[], bool]) -> bool:
        return done() or (leaves and rank.bereft())

    def _turn(self, rank: Rank, waiting) -> None:
        leaves, done = waiting.pop(rank.number, (False, lambda: True))
        try:
            # A collective may end here although somebody in it is lost, or not.
            if leaves and rank.bereft() and (not done() or self.random.random() < 0.5):
                waiting[rank.number] = rank.turns.throw(Lost())
            else:
                waiting[rank.number] = next(rank.turns)
        except StopIteration as end:
            rank.alive, rank.over, rank.fate = False, True, end.value
        except (Lost, SystemExit):
            rank.alive = False  # a newcomer that nobody needs any more


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32))
def test_survivors_never_diverge(seed):
    """All call the same collectives in the same order, nobody waits for ever, and each has each sum once."""
    job = Simulation(seed)
    job.run()
    for rank in job.ranks.values():
        assert rank.sums == list(range(rank.sums[0], rank.sums[0] + len(rank.sums))) if rank.sums else True
        if rank.fate == "ended":
            assert rank.sums[-1] == POINTS - 1
