"""Which nodes the Slurm broker takes and gives back: nobody waits for the job who could run without it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.broker.slurm.room import Waiting, considerate, greedy

NODES = [f"n{i}" for i in range(8)]
SOME = st.frozensets(st.sampled_from(NODES))
JOBS = st.lists(st.builds(Waiting, st.just("job 7"), st.integers(1, 6), SOME), max_size=5)


@st.composite
def clusters(draw):
    idle = draw(SOME)
    usable = draw(st.frozensets(st.sampled_from(sorted(idle)))) if idle else frozenset()
    rest = sorted(set(NODES) - idle)
    companions = dict(enumerate(draw(st.permutations(rest))[: draw(st.integers(0, len(rest)))]))
    return idle, usable, companions, draw(JOBS)


@given(clusters())
def test_what_is_taken_and_given_back_is_there(cluster):
    idle, usable, companions, waiting = cluster
    room = considerate(*cluster)
    assert set(room.free) <= usable <= idle
    assert len(set(room.back)) == len(room.back)
    assert set(room.back) <= companions.keys()
    assert room.why
    if not waiting:
        assert (set(room.free), room.back) == (usable, ())


@given(clusters())
def test_the_first_in_line_gets_what_it_could_start_with(cluster):
    """After the job has taken and given back all it may, the first pending job that could start at all can."""
    idle, _, companions, waiting = cluster
    room = considerate(*cluster)
    everything = idle | set(companions.values())
    left = (idle - set(room.free)) | {companions[number] for number in room.back}
    for job in waiting:
        if len(everything & job.could_use) >= job.nodes:
            assert len(left & job.could_use) >= job.nodes
            break


@given(clusters())
def test_nothing_is_given_back_for_nothing(cluster):
    """Each pending job adds to what is given back no more than it lacks, at most, after those before it have theirs."""
    idle, usable, companions, waiting = cluster
    before, taken = (), 0
    for count, job in enumerate(waiting, 1):
        back = considerate(idle, usable, companions, waiting[:count]).back
        assert back[: len(before)] == before
        assert len(back) - len(before) <= max(0, job.nodes - max(0, len(idle & job.could_use) - taken))
        assert all(companions[number] in job.could_use for number in back[len(before) :])
        before, taken = back, taken + job.nodes


def test_a_job_of_two_nodes():
    room = considerate({"n3"}, {"n3"}, {0: "n1", 1: "n2"}, [Waiting("job 9", 2, frozenset(NODES))])
    assert (room.free, room.back) == ((), (1,))
    assert room.why == "job 9 could start with 1 more node"


def test_nodes_that_do_not_suit_the_job_are_left_to_others_first():
    room = considerate({"n1", "n2"}, {"n1"}, {}, [Waiting("job 9", 1, frozenset(NODES))])
    assert room.free == ("n1",)


def test_a_job_that_could_not_start_anyway_changes_nothing():
    room = considerate({"n3"}, {"n3"}, {0: "n1"}, [Waiting("job 9", 4, frozenset(NODES))])
    assert (room.free, room.back) == (("n3",), ())


def test_greedy_takes_all():
    assert greedy({"n2", "n1"}).free == ("n1", "n2")
