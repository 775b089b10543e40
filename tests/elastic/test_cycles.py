"""Many cycles of growing and shrinking leave nothing behind, in the job or on the machine."""

from __future__ import annotations

import sys

from ..afterwards import resizes
from ..launch import SCRIPTS, Job, hpc_elastic

CYCLES, SOME, WARM_UP = 100, 40, 5
MOST_GROWTH_BYTES = 400_000  # a cycle; the MPIs themselves keep about 0.1 MB for each spawn


def test_cycles(tmp_path, pytestconfig):
    cycles = CYCLES if pytestconfig.getoption("all_faults") else SOME
    table = ",".join(f"{10 * i}:2,{10 * i + 5}:1" for i in range(1, cycles + 1))
    script = [SCRIPTS / "cycles.py", 10 * (cycles + 2), 10 * (WARM_UP + 1)]
    options = ["--run-dir", "r", "--slots", 2, "--timetable", table, "--hold"]
    with Job(hpc_elastic("run", *options, *script), folder=tmp_path, limit_s=240) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert [event.after for event in resizes(tmp_path / "r")] == [2, 1] * cycles
    first, last = map(int, done.value("descriptors").split())
    grown = int(done.value("grown_bytes")) / (cycles - WARM_UP)
    sys.stderr.write(f"descriptors {first} -> {last}, memory {grown / 1000:.0f} kB a cycle\n")
    assert last <= first
    assert grown < MOST_GROWTH_BYTES
