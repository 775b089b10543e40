"""What the leader reports of those that are lost: how they ended, as soon as their guards have said so."""

from __future__ import annotations

import pytest

from hpc_elastic.model import Member
from hpc_elastic.rundir import End, RunDirectory
from hpc_elastic.runtime.reports import RECORDED_S, await_ends


@pytest.mark.parametrize("recorded", [True, False])
def test_the_records_of_the_lost_are_awaited(recorded, tmp_path):
    """But not for long."""
    run = RunDirectory.create(tmp_path / "run")
    now, members = 0.0, tuple(Member(number, 100 + number, "here") for number in range(2))

    def pause(seconds):
        nonlocal now
        number = round(now / seconds)
        now += seconds
        if number < 2 and recorded:
            end = End(member=number, pid=1, host="here", code=137, signal=9, time=0.0, peak_bytes=0, last_words="")
            run.put(run.path / "ranks" / f"{number}.end.json", end)

    await_ends(run, members, lambda: now, pause)
    assert (len(run.ends()), now >= RECORDED_S) == ((2, False) if recorded else (0, True))
