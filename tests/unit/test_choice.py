"""Which way GPU arrays are added up, and which GPU a rank takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.arrays.gpu import pick
from hpc_elastic.errors import ConfigError
from hpc_elastic.reduce.choice import Found, choose

ranks = st.lists(
    st.builds(Found, st.sampled_from(["a", "b"]), st.sampled_from(["", "0", "1", "2"]), st.sampled_from([0, 21803, 22203])),
    min_size=1,
    max_size=6,
)


@given(ranks)
def test_nccl_is_taken_where_it_can_work_and_nowhere_else(found):
    can = (
        all(one.gpu and one.nccl for one in found)
        and len({one.nccl for one in found}) == 1
        and len({(one.host, one.gpu) for one in found}) == len(found)
    )
    choice = choose(found)
    assert choice.nccl == can
    assert choice.reason


@given(ranks, st.randoms())
def test_the_way_does_not_depend_on_the_order_of_the_ranks(found, random):
    mixed = random.sample(found, len(found))
    assert choose(mixed).nccl == choose(found).nccl


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([Found("a", "0", 22203), Found("a")], "rank 1 has no GPU"),
        ([Found("a", "0", 22203), Found("a", "1")], "rank 1 has no NCCL"),
        ([Found("a", "0", 22203), Found("b", "0", 21803)], "ranks 0 and 1 have different versions"),
        ([Found("a", "0", 22203), Found("a", "0", 22203)], "2 ranks share GPU 0 of a"),
        ([Found("a", "0", 22203), Found("b", "0", 22203)], "each of 2 ranks has a GPU of its own"),
    ],
)
def test_the_reason_is_told(found, reason):
    assert reason in choose(found).reason


environments = st.dictionaries(st.sampled_from(["CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"]), st.sampled_from(["", "0", "3,4"]))


@given(st.integers(0, 99), environments, st.integers(1, 16))
def test_a_rank_takes_a_gpu_that_is_there(local_rank, environ, count):
    assert 0 <= pick(local_rank, environ, count) < count


@given(st.integers(0, 99), environments)
def test_the_only_one_is_taken(local_rank, environ):
    """As where Slurm has given each rank one of its own."""
    assert pick(local_rank, environ, 1) == 0


@given(st.integers(1, 16), environments)
def test_as_many_ranks_as_gpus_share_none(count, environ):
    assert sorted(pick(rank, environ, count) for rank in range(count)) == list(range(count))


@given(st.integers(0, 99), environments)
def test_none_is_visible(local_rank, environ):
    with pytest.raises(ConfigError, match="no GPU is visible to this rank: ") as caught:
        pick(local_rank, environ, 0)
    named = "CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in environ else "Slurm" if environ else "extra gpu"
    assert named in str(caught.value)
