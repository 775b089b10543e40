"""Registered state arrives as it was sent, whatever it is made of, and in place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpc_elastic import state
from hpc_elastic.errors import ConfigError, MembershipError
from hpc_elastic.state import ArrayState, DictState, Registry, stateful

quick = settings(deadline=None, max_examples=60)


class FakeChannel:
    """One sender and any number of receivers in one process: what is sent is kept, and each receiver gets it in order."""

    def __init__(self, rank=0, sent=None):
        self.rank = rank
        self.sent = [] if sent is None else sent

    def tell(self, data):
        if self.rank == 0:
            assert data is not None
            self.sent.append(bytes(data))
            return data
        assert data is None
        return self.sent.pop(0)

    def fill(self, array):
        flat = array.view(np.uint8).reshape(-1)  # as the real one does; fails if it would need a copy
        assert not array.size or np.shares_memory(flat, array)
        if self.rank == 0:
            self.sent.append(flat.tobytes())
        else:
            assert len(self.sent[0]) == flat.nbytes, "the two sides are not in step"
            flat[:] = np.frombuffer(self.sent.pop(0), np.uint8)


class Thing:
    """Something with a state of its own."""

    def __init__(self, values):
        self.values = values
        self.loaded = 0

    def state(self):
        return self.values

    def load(self, values):
        self.loaded += 1
        self.values = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in values.items()}


def registry(**owners):
    made = Registry()
    made.add(owners)
    return made


def carry(sender, *receivers):
    """Send from one registry to others; return the number of bytes that `send` counted."""
    channel = FakeChannel()
    count = sender.send(channel)
    assert count == sum(map(len, channel.sent))
    for rank, receiver in enumerate(receivers, 1):
        left = list(channel.sent)
        receiver.receive(FakeChannel(rank, left))
        assert not left, "something sent was not received"
    return count


def assert_same(got, expected):
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.tobytes() == expected.tobytes()
    else:
        assert repr(got) == repr(expected)  # NaN is not equal to itself


@st.composite
def arrays(draw):
    """Arrays of any form: without elements or axes, transposed, strided, of any plain dtype and byte order."""
    dtype = draw(
        st.one_of(
            hnp.boolean_dtypes(),
            hnp.integer_dtypes(endianness="?"),
            hnp.floating_dtypes(endianness="?"),
            hnp.complex_number_dtypes(),
            hnp.unicode_string_dtypes(min_len=1, max_len=3),
            hnp.datetime64_dtypes(),
        )
    )
    shape = draw(st.sampled_from([(), (0,), (1,), (7,), (0, 3), (3, 0), (2, 3), (5, 1, 2)]))
    array = draw(hnp.arrays(dtype, shape, fill=st.nothing() if np.prod(shape) < 4 else None))
    change = draw(st.sampled_from(["", "T", "step", "back", "fortran"]))
    if change == "T":
        return array.T
    if change == "fortran":
        return np.asfortranarray(array)
    if change and array.ndim:
        return array[::2] if change == "step" else array[::-1]
    return array


plain = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9))
states = st.dictionaries(st.text(max_size=4), st.one_of(arrays(), plain), max_size=6)
owners = st.dictionaries(st.sampled_from(["model", "rng", "x", "ö"]), states, max_size=3)


@quick
@given(owners, st.sampled_from([0, 1, 20, 1 << 16]))
def test_states_arrive_as_they_were_sent(sent, small):
    things = {name: Thing(values) for name, values in sent.items()}
    others = [{name: Thing({}) for name in sent} for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "SMALL_BYTES", small)
        carry(registry(**things), *(registry(**other) for other in others))
    for other in others:
        for name, values in sent.items():
            assert other[name].loaded == 1
            assert list(other[name].values) == list(values)
            for key, value in values.items():
                assert_same(other[name].values[key], value)


@quick
@given(states)
def test_dicts_arrive_as_they_were_sent(sent):
    other = {}
    carry(registry(values=sent), registry(values=other))
    assert list(other) == list(sent)
    for key, value in sent.items():
        assert_same(other[key], value)
        if isinstance(value, np.ndarray):
            assert other[key].flags.writeable
            assert other[key].flags.aligned


def test_small_and_large_arrays_by_hand():
    sizes = [0, 1, 3, state.SMALL_BYTES - 1, state.SMALL_BYTES, state.SMALL_BYTES + 1]
    sent = {str(n): (np.arange(n) % 251).astype(np.uint8) for n in sizes} | {"f": np.arange(20_000.0).reshape(100, 200).T}
    other = {}
    carry(registry(x=sent), registry(x=other))
    for key, value in sent.items():
        assert_same(other[key], np.ascontiguousarray(value))


def test_small_arrays_travel_together():
    channel = FakeChannel()
    registry(x={str(i): np.full(i, i, np.int16) for i in range(50)}).send(channel)
    assert len(channel.sent) == 2


def test_an_array_is_changed_in_place():
    sent, own = np.arange(12.0).reshape(3, 4), np.zeros((3, 4))
    carry(registry(x=sent), registry(x=own))
    assert_same(own, sent)
    strided = np.zeros((6, 8))
    carry(registry(x=sent), registry(x=strided[::2, ::2]))
    assert strided[::2, ::2].tolist() == sent.tolist()
    assert strided.sum() == sent.sum()
    number = np.array(1.5)
    carry(registry(x=np.array(2.5)), registry(x=number))
    assert number == 2.5


def test_a_dict_is_changed_in_place():
    own = {"w": np.zeros(3), "n": 0, "b": np.zeros(2), "h": np.zeros(3, np.float32), "rest": 7}
    kept = dict(own)
    sent = {"w": np.arange(3.0), "n": 5, "b": np.ones(4), "h": np.arange(3.0) / 3, "new": np.ones(1)}
    carry(registry(x=sent), registry(x=own))
    assert own["w"] is kept["w"]
    assert own["rest"] == 7
    for key, value in sent.items():
        assert_same(own[key], value)
    assert kept["h"].tolist() == [0, 0, 0], "of another dtype: it is replaced, not rounded"


def test_what_is_loaded_is_the_receivers_own():
    first, second = {}, {}
    carry(registry(x={"a": np.zeros(2), "b": np.zeros(2)}), registry(x=first), registry(x=second))
    first["a"][:] = 1
    assert second["a"].tolist() == first["b"].tolist() == [0, 0]


def test_sending_changes_nothing():
    sent = {"a": np.arange(6.0).reshape(2, 3).T, "b": 1}
    before = sent["a"].copy()
    assert registry(x=sent).send(FakeChannel())
    assert list(sent) == ["a", "b"]
    assert_same(sent["a"], before)


def test_nothing_registered():
    assert carry(Registry(), Registry()) > 0
    carry(registry(x={}), registry(x={}))


def test_the_order_of_registering_does_not_matter():
    a, b = np.zeros(2), {}
    carry(registry(a=np.ones(2), b={"n": 1}), registry(b=b, a=a))
    assert a.tolist() == [1, 1]
    assert b == {"n": 1}


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "own"),
    [(["x"], ["y"]), (["x", "y"], ["x"]), (["x"], ["x", "y"]), ([], ["x"]), (["x"], [])],
)
@pytest.mark.parametrize("value", [{}, {"n": 1}])
def test_wrong_names(sent, own, value):
    channel = FakeChannel()
    registry(**{name: dict(value) for name in sent}).send(channel)
    with pytest.raises(MembershipError, match=f"{', '.join(sent) or 'nothing'}.*{', '.join(own) or 'nothing'}"):
        registry(**{name: {} for name in own}).receive(FakeChannel(1, channel.sent))


@pytest.mark.parametrize(
    "other", [np.zeros((2, 3)), np.zeros(4), np.zeros(1), np.zeros(3, np.float32), np.zeros(3, np.int64)]
)
def test_an_array_of_another_form_is_refused(other):
    """NumPy would stretch and round it."""
    with pytest.raises(ConfigError, match="received an array"):
        carry(registry(x=np.ones(3)), registry(x=other))


@pytest.mark.parametrize("value", [np.array([None]), np.zeros(2, [("a", "i4"), ("b", "f8")])])
def test_arrays_that_cannot_be_sent(value):
    for owner in (value, {"array": value}):
        channel = FakeChannel()
        with pytest.raises(ConfigError, match=r"register\(x=…\): 'array' is an array of .*can't be sent"):
            registry(x=owner).send(channel)
        assert not channel.sent, "others must not wait for the rest"


@pytest.mark.parametrize("value", [np.float32(1), object(), 2**70, 1j])
def test_values_that_cannot_be_sent(value):
    channel = FakeChannel()
    with pytest.raises(ConfigError, match=r"register\(x=…\): 'n' can't be sent"):
        registry(x={"w": np.zeros(2), "n": value}).send(channel)
    assert not channel.sent


def test_a_name_can_be_taken_once():
    made = registry(x=np.zeros(1))
    with pytest.raises(ConfigError, match=r"register\(x=…\): the name is taken"):
        made.add({"y": {}, "x": {}})
    assert made.names()[0] == "x"


@pytest.mark.parametrize("value", [3, "text", [np.zeros(1)], None, object()])
def test_what_has_no_state(value):
    with pytest.raises(ConfigError, match=rf"register\(x=…\): a {type(value).__name__} has no state"):
        stateful("x", value)


def test_what_has_a_state():
    thing = Thing({})
    assert stateful("x", thing) is thing
    assert isinstance(stateful("x", np.zeros(1)), ArrayState)
    assert isinstance(stateful("x", {}), DictState)
