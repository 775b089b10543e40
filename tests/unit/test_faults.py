"""Faults: what is one, whom it is meant for, and that each happens once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic import faults
from hpc_elastic.errors import ConfigError, JobError
from hpc_elastic.faults import ACTIONS, NUMBERS, ROLES, STAGES, VARIABLE, Fault, Faults, parse

FACTS = {"rank": 1, "gen": 3, "step": 20, "member": 5, "role": "other"}


def fault(text):
    return Fault.parse(text)


@pytest.fixture
def armed(tmp_path, monkeypatch):
    """Arm the fault points of this process with what stands in the environment, as in a run."""
    before = faults.at

    def arm(text):
        monkeypatch.setenv(VARIABLE, text)
        faults.arm(tmp_path / "faults", lambda: FACTS)

    yield arm
    faults.at = before


# --- what is one ----------------------------------------------------------------------------------------------------------


def test_parts():
    found = fault(" merge:kill:rank=1:gen=3 ")
    assert (found.stage, found.action, found.conditions) == ("merge", "kill", {"rank": "1", "gen": "3"})
    assert found.text == "merge:kill:rank=1:gen=3"
    assert fault("warm:delay=0.5").delay_s == 0.5


def test_several():
    assert [each.stage for each in parse("sum:stop:step=20; warm:delay=2:member=2;")] == ["sum", "warm"]
    assert parse("") == ()


written = st.builds(
    lambda stage, action, conditions: ":".join([stage, action, *(f"{key}={value}" for key, value in conditions.items())]),
    st.sampled_from(STAGES),
    st.sampled_from([action if action != "delay" else "delay=1.5" for action in ACTIONS]),
    st.fixed_dictionaries(
        {}, optional={**dict.fromkeys(NUMBERS, st.integers(0, 99).map(str)), "role": st.sampled_from(ROLES)}
    ),
)


@given(st.lists(written, max_size=4))
def test_all_that_can_be_written_is_read(texts):
    assert [each.text for each in parse(";".join(texts))] == texts


@pytest.mark.parametrize(
    "text",
    [
        *("merge", "merge:", "nowhere:kill", "merge:hurt", "merge:kill=3", "merge:delay", "merge:delay=soon"),
        *("merge:kill:rank", "merge:kill:rank=-1", "merge:kill:rank=one", "merge:kill:host=1", "merge:kill:role=boss"),
        *("merge:kill:", "merge:kill::rank=1", "merge:delay=nan", "merge:delay=-1"),
    ],
)
def test_bad_ones_are_refused(text):
    with pytest.raises(ConfigError, match=f"{VARIABLE}: '{text}' is not STAGE:ACTION"):
        parse(text)


# --- whom it is meant for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sum:kill", True),
        ("merge:kill", False),
        ("sum:kill:rank=1:gen=3:step=20:member=5:role=other", True),
        ("sum:kill:rank=2", False),
        ("sum:kill:rank=1:step=21", False),
        ("sum:kill:role=leader", False),
    ],
)
def test_conditions(text, expected):
    assert fault(text).matches("sum", FACTS) == expected


# --- what happens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals(action, number):
    code = f"from hpc_elastic.faults import Fault; Fault.parse('sum:{action}').happen()"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        if action == "stop":
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WSTOPSIG(status) == number
            process.kill()
        else:
            assert process.wait(30) == -number


def test_delay(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    fault("sum:delay=0.25").happen()
    assert slept == [0.25]


def test_errors():
    with pytest.raises(JobError, match="fault sum:raise:rank=1"):
        fault("sum:raise:rank=1").happen()
    with pytest.raises(OSError, match="fault write:disk-full") as caught:
        fault("write:disk-full").happen()
    assert caught.value.errno == errno.ENOSPC


# --- when -----------------------------------------------------------------------------------------------------------------


def test_each_happens_once_in_a_run(tmp_path):
    several = [Faults(parse("sum:raise;sum:raise:rank=1"), tmp_path / "faults", lambda: FACTS) for _ in range(3)]
    for process in several[:2]:
        with pytest.raises(JobError):
            process.at("sum")
    several[2].at("sum")
    assert sorted(path.name for path in (tmp_path / "faults").iterdir()) == ["0", "1"]


def test_nothing_is_written_where_nothing_happens(tmp_path):
    Faults(parse("sum:raise:rank=2"), tmp_path / "faults", lambda: FACTS).at("sum")
    assert not (tmp_path / "faults").exists()


def test_armed(armed):
    armed("sum:raise")
    faults.at("merge")
    with pytest.raises(JobError):
        faults.at("sum")


def test_unarmed(armed):
    before = faults.at
    armed("")
    assert faults.at is before
    before("sum")


def test_bad_faults_stop_the_job(armed):
    with pytest.raises(ConfigError):
        armed("sum:explode")
