"""The same bits and each sample once, through random timetables of resizes with any rank leaving."""

from __future__ import annotations

import random

import pytest

from hpc_elastic.policy import Entry, Timetable

from ..afterwards import check_ledger, resizes
from ..launch import SCRIPTS, Job, hpc_elastic
from ..rarely import also
from ..shards import SAMPLES

EPOCHS, BATCH = 3, 64
STEPS = EPOCHS * -(-SAMPLES // BATCH)
SEEDS, SOME = range(30), 6


def seeds(config, every, some):
    """Return the seeds of random schedules: `some` of them, or with --all-faults all."""
    return every if config.getoption("all_faults") else every[:some]


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", seeds(metafunc.config, SEEDS, SOME))


def timetable(seed: int, last: int = STEPS - 1) -> Timetable:
    """Return a random timetable of 2 to 6 resizes between 1 and 4 ranks; most shrinks name who leaves, often rank 0."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(last), rng.randint(2, 6)))
    size, entries = 1, []
    for step in steps:
        ranks = rng.choice([n for n in range(1, 5) if n != size or size > 1])
        leavers: tuple[int, ...] = ()
        if ranks <= size and (ranks == size or rng.random() < 0.7):
            leavers = tuple(sorted(rng.sample(range(size), max(1, size - ranks))))
            if rng.random() < 0.4 and 0 not in leavers:
                leavers = (0, *leavers[1:])
        entries.append(Entry(step, ranks, leavers))
        size = ranks
    return Timetable(tuple(entries))


@pytest.fixture(scope="module")
def static(shards, tmp_path_factory):
    """What one static rank computes."""
    folder = tmp_path_factory.mktemp("static")
    with Job(hpc_elastic("run", "--run-dir", "r", SCRIPTS / "softmax.py", shards, EPOCHS), folder=folder) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert float.fromhex(done.value("loss")) < 0.2
    return done.value("sha256")


def test_random_timetables(seed, shards, static, tmp_path):
    table = timetable(seed)
    print(f"seed {seed}: {table}")
    options = ["--run-dir", "r", "--slots", 5, "--max", 4, "--timetable", table, "--set", "ledger=true", "--hold"]
    with Job(hpc_elastic("run", *options, SCRIPTS / "softmax.py", shards, EPOCHS), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    check_ledger(tmp_path / "r", EPOCHS, SAMPLES)
    found = resizes(tmp_path / "r")
    assert [event.after for event in found] == sizes(table)
    assert [event.step for event in found] == [entry.step for entry in changing(table)]


@pytest.mark.parametrize("wire", ["bfloat16", also("float16")])
def test_two_bytes_a_value(wire, shards, static, tmp_path):
    """The same bits at any number of ranks, on one host or several: others than with four bytes."""
    found = set()
    for number, options in enumerate(
        [["--ranks", 1], ["--ranks", 2, "--hold"], ["--slots", 3, "--timetable", "5:3,20:2-0", "--hold"]]
    ):
        for where in [[], ["--apart"]] if number else [[]]:
            script = [SCRIPTS / "softmax.py", shards, EPOCHS, "--wire", wire, *where]
            folder = tmp_path / f"{number}{len(where)}"
            folder.mkdir()
            with Job(hpc_elastic("run", "--run-dir", "r", *options, *script), folder=folder) as job:
                done = job.wait()
            assert done.code == 0, done.err
            assert float.fromhex(done.value("loss")) < 0.2
            found.add(done.value("sha256"))
    assert len(found) == 1
    assert found != {static}


def changing(table: Timetable) -> list[Entry]:
    """Return the entries that change something."""
    size, found = 1, []
    for entry in table.entries:
        if entry.ranks != size or entry.leavers:
            found.append(entry)
        size = entry.ranks
    return found


def sizes(table: Timetable) -> list[int]:
    """Return the number of ranks after each entry that changes something."""
    return [entry.ranks for entry in changing(table)]


def test_nobody_waits(shards, static, tmp_path):
    """Without hold, the members step on while newcomers warm up, and the bits are the same."""
    options = ["--run-dir", "r", "--slots", 4, "--timetable", "3:3,30:2-0", "--set", "ledger=true"]
    script = [SCRIPTS / "softmax.py", shards, EPOCHS, "--pause", "0.2", "--warm", "0.5"]
    with Job(hpc_elastic("run", *options, *script), folder=tmp_path) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert done.value("sha256") == static
    check_ledger(tmp_path / "r", EPOCHS, SAMPLES)
    grown = resizes(tmp_path / "r")[0]
    assert grown.after == 3
    assert grown.step >= 3 + 5  # half a second of warming is at least five steps of 50 ms on a busy machine
