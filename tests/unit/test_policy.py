"""Policies: what they decide within the limits, and what a resize means for the ranks there are."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.errors import ConfigError, ResizeRefused
from hpc_elastic.model import Lease, Observation, Resize, Supply
from hpc_elastic.policy import Eager, Entry, Fixed, Manual, Timetable, bounded, check, give_back, leaving, newcomers


def seen(ranks=2, *, step=0, low=1, high=8, offered=8, revoked=0, decided=0, asked=None, why=""):
    supply = Supply(offered, revoked=tuple(Lease(slot) for slot in range(revoked)), why=why)
    return Observation(
        step=step, time_s=0.0, ranks=ranks, min_ranks=low, max_ranks=high, supply=supply, decided=decided, asked=asked
    )


@st.composite
def observations(draw):
    low = draw(st.integers(1, 6))
    high = draw(st.integers(low, 10))
    return seen(
        draw(st.integers(1, 10)),
        step=draw(st.integers(0, 50)),
        low=low,
        high=high,
        offered=draw(st.integers(0, 6)),
        revoked=draw(st.integers(0, 3)),
        decided=draw(st.integers(0, 3)),
        asked=draw(st.none() | st.integers(0, 12)),
    )


@st.composite
def timetables(draw, most_leavers=3):
    steps = sorted(draw(st.sets(st.integers(0, 50), min_size=1, max_size=4)))
    leavers = st.lists(st.integers(0, 9), unique=True, max_size=most_leavers).map(tuple)
    return Timetable(tuple(Entry(step, draw(st.integers(1, 12)), draw(leavers)) for step in steps))


policies = st.one_of(st.just(Manual()), st.just(Eager()), st.builds(Fixed, st.integers(1, 12)), timetables())


# --- timetables in writing ------------------------------------------------------------------------------------------------


@given(timetables())
def test_a_timetable_reads_what_it_writes(timetable):
    assert Timetable.parse(str(timetable)) == timetable


def test_a_timetable_by_hand():
    expected = Timetable((Entry(20, 3), Entry(40, 2, (0,)), Entry(60, 3, (1, 2))))
    assert Timetable.parse("20:3,40:2-0,60:3-1+2") == expected
    assert Timetable.parse(" 20:3, 40:2-0 , 60:3-1+2 ") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not STEP:RANKS"),
        ("20", "'20' is not STEP:RANKS"),
        ("20:3,", "'' is not STEP:RANKS"),
        ("20:x", "'20:x' is not"),
        ("-1:2", "'-1:2' is not"),
        ("20:3-", "'20:3-' is not"),
        ("20:3-1,2", "'2' is not"),
        ("20:3-1-2", "'20:3-1-2' is not"),
        ("²:3", "'²:3' is not"),
        ("٢:3", "'٢:3' is not"),
        ("20:0", "'20:0' asks for 0 ranks"),
        ("20:3-1+1", "names a leaver twice"),
        ("20:3,20:4", "'20:4' stands after '20:3'; steps must increase"),
        ("20:3,30:3,10:4", "'10:4' stands after '30:3'"),
    ],
)
def test_a_timetable_that_makes_no_sense(text, message):
    with pytest.raises(ConfigError, match="timetable: .*" + message):
        Timetable.parse(text)


def test_a_timetable_needs_entries():
    with pytest.raises(ConfigError, match="no entries"):
        Timetable(())


# --- decisions ------------------------------------------------------------------------------------------------------------


@given(observations(), policies)
def test_decisions_keep_to_limits_and_supply(now, policy):
    resize = policy.decide(now)
    if resize is None:
        return
    assert resize.reason
    if resize.ranks == now.ranks and not resize.leavers:
        assert isinstance(policy, Timetable), "only a timetable says that nothing changes"
        assert "changes nothing" in resize.reason
        return
    assert 1 <= now.min_ranks <= resize.ranks <= now.max_ranks
    assert all(0 <= rank < now.ranks for rank in resize.leavers)
    assert newcomers(now.ranks, resize) <= now.supply.offered


@given(observations(), policies)
def test_what_is_taken_back_comes_first(now, policy):
    revoked = len(now.supply.revoked)
    back = give_back(now)
    least = min(max(1, now.min_ranks, now.ranks - revoked), now.max_ranks)
    if revoked and least < now.ranks:
        assert back is not None
        assert back.ranks == least
        assert back.leavers == ()
        assert f"takes back {revoked} slot" in back.reason
        assert policy.decide(now) == back
    else:
        assert back is None


@pytest.mark.parametrize(
    ("now", "wanted", "ranks"),
    [
        (seen(2), 4, 4),
        (seen(2, high=3), 4, 3),
        (seen(2, low=2), 1, None),
        (seen(3, low=2), 1, 2),
        (seen(2, offered=1), 4, 3),
        (seen(2, offered=0), 4, None),
        (seen(2), 2, None),
        (seen(4, offered=0), 1, 1),
    ],
)
def test_bounded(now, wanted, ranks):
    resize = bounded(now, wanted, "because")
    if ranks is None:
        assert resize is None
    else:
        assert resize is not None
        assert resize.ranks == ranks
        assert resize.reason.startswith("because")
        assert ("instead of" in resize.reason) == (ranks != wanted)


def test_what_limits_is_said():
    resize = bounded(seen(2, offered=1, why="3 cores"), 4, "because")
    assert resize is not None
    assert resize.reason.startswith("because; 3 instead of 4: ")
    assert "3 cores" in resize.reason
    for now, wanted, limit in (
        (seen(2, high=3, why="3 cores"), 4, "max 3"),
        (seen(4, low=2, why="3 cores"), 1, "min 2"),
    ):
        resize = bounded(now, wanted, "because")
        assert resize is not None
        assert limit in resize.reason
        assert "cores" not in resize.reason


def test_leavers_are_replaced():
    assert bounded(seen(3), 3, "because", (1,)) == Resize(3, (1,), "because")
    assert bounded(seen(3), 3, "because", (1, 7)) == Resize(3, (1,), "because")


@pytest.mark.parametrize(
    ("now", "wanted", "leavers", "ranks", "left"),
    [
        (seen(3, offered=0), 3, (1,), 2, (1,)),  # no slot for a replacement
        (seen(3, offered=1), 3, (0, 1), 2, (0, 1)),
        (seen(3, offered=1), 4, (0,), 3, (0,)),
        (seen(3, offered=0, low=3), 3, (1,), None, ()),  # it would get too small
        (seen(3, offered=1, low=3), 3, (0, 1), 3, (0,)),
        (seen(3, offered=0), 2, (0,), 2, (0,)),  # no replacement needed
    ],
)
def test_replacements_take_from_the_offer(now, wanted, leavers, ranks, left):
    resize = bounded(now, wanted, "because", leavers)
    if ranks is None:
        assert resize is None
    else:
        assert resize is not None
        assert (resize.ranks, resize.leavers) == (ranks, left)


@given(observations(), st.integers(1, 12), st.lists(st.integers(0, 9), unique=True, max_size=4).map(tuple))
def test_bounded_comes_as_near_as_it_can(now, wanted, leavers):
    resize = bounded(now, wanted, "because", leavers)
    possible = [n for n in range(now.min_ranks, now.max_ranks + 1) if n <= now.ranks + now.supply.offered]
    if not leavers:
        nearest = min(possible, key=lambda n: abs(n - wanted), default=now.ranks)
        assert (resize.ranks if resize else now.ranks) == nearest
    if resize:
        assert set(resize.leavers) <= set(leavers)


def test_manual_does_what_is_asked():
    assert Manual().decide(seen(2)) is None
    assert Manual().decide(seen(2, asked=2)) is None
    resize = Manual().decide(seen(2, asked=5))
    assert resize is not None
    assert (resize.ranks, resize.leavers) == (5, ())


def test_fixed_wants_its_number_again_and_again():
    policy = Fixed(4)
    assert policy.decide(seen(4)) is None
    for now, ranks in ((seen(2, offered=1), 3), (seen(3), 4), (seen(6), 4)):
        resize = policy.decide(now)
        assert resize is not None
        assert resize.ranks == ranks
    assert policy.decide(seen(2, offered=0)) is None


@given(timetables(), st.integers(1, 6))
def test_a_timetable_is_decided_in_order(timetable, ranks):
    """Every entry once, not before its step, whatever became of the one before, and an idle one too."""
    decided = 0
    for step in range(60):
        while (resize := timetable.decide(seen(ranks, step=step, high=12, offered=12, decided=decided))) is not None:
            entry = timetable.entries[decided]
            assert step >= entry.step
            assert resize.ranks == entry.ranks
            assert resize.leavers == tuple(rank for rank in entry.leavers if rank < ranks)
            assert resize.reason.startswith(f"timetable: {entry}")
            decided += 1
        due = sum(entry.step <= step for entry in timetable.entries)
        assert decided == due
    assert decided == len(timetable.entries)


def test_entries_that_were_missed_come_one_by_one():
    timetable = Timetable.parse("1:2,2:3,3:4")
    resize = timetable.decide(seen(1, step=100, decided=1))
    assert resize is not None
    assert resize.ranks == 3


def test_an_entry_without_effect_is_decided_all_the_same():
    for text, offered in (("1:2", 8), ("1:4", 0)):
        resize = Timetable.parse(text).decide(seen(2, step=1, offered=offered))
        assert resize is not None
        assert (resize.ranks, resize.leavers) == (2, ())
        assert f"timetable: {text} changes nothing" in resize.reason


@given(observations(), policies)
def test_before_its_next_step_a_policy_decides_alike(now, policy):
    """So the leader need not ask it, unless something else has changed."""
    due, undecided = policy.next_step(now.step, now.decided), policy.decide(now) is None
    assert due >= now.step
    for step in range(now.step, min(60, int(min(due, 60)))):
        assert (policy.decide(msgspec.structs.replace(now, step=step)) is None) == undecided


# --- what a resize means --------------------------------------------------------------------------------------------------


@given(st.integers(1, 10), st.integers(1, 12), st.data())
def test_who_leaves_and_how_many_come(size, ranks, data):
    named = data.draw(st.lists(st.integers(0, size - 1), unique=True).map(tuple))
    resize = Resize(ranks, named)
    gone, new = leaving(size, resize), newcomers(size, resize)
    assert set(named) <= set(gone)
    assert list(gone) == sorted(set(gone))
    assert set(gone) <= set(range(size))
    assert new >= 0
    assert size - len(gone) + new == ranks
    others = set(gone) - set(named)
    assert not (others and new), "somebody leaves who was not named, and is replaced"
    stayers = set(range(size)) - set(gone)
    assert not others or not stayers or min(others) > max(stayers - set(named), default=-1)


@pytest.mark.parametrize(
    ("size", "resize", "gone", "new"),
    [
        (3, Resize(2), (2,), 0),
        (3, Resize(2, (0,)), (0,), 0),
        (3, Resize(1, (1,)), (1, 2), 0),
        (3, Resize(3, (1,)), (1,), 1),
        (3, Resize(4, (0, 2)), (0, 2), 3),
        (2, Resize(2, (0, 1)), (0, 1), 2),
        (1, Resize(3), (), 2),
    ],
)
def test_leaving_by_hand(size, resize, gone, new):
    assert leaving(size, resize) == gone
    assert newcomers(size, resize) == new


@pytest.mark.parametrize(
    ("ranks", "leavers", "message"),
    [
        (0, (), "0 ranks asked for: a job has at least 1.*hpc-elastic stop"),
        (-2, (), "-2 ranks asked for"),
        (1, (), "1 ranks asked for, but min = 2"),
        (7, (), "7 ranks asked for, but max = 6; where it is not set, slots or microbatches limit it"),
        (3, (4,), "rank 4 should leave, but there are only ranks 0 to 3"),
        (3, (-1,), "rank -1 should leave"),
        (3, (0, 1, 0), "one of them twice: 0, 1, 0"),
        (4, (), "already at 4 ranks"),
    ],
)
def test_what_is_refused_and_why(ranks, leavers, message):
    with pytest.raises(ResizeRefused, match=message):
        check(ranks, leavers=leavers, now=4, minimum=2, maximum=6)


@pytest.mark.parametrize(("ranks", "leavers"), [(2, ()), (6, ()), (3, (0, 3)), (4, (3,))])
def test_what_is_not_refused(ranks, leavers):
    check(ranks, leavers=leavers, now=4, minimum=2, maximum=6)
