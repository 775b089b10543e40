"""Sums and steps must not become much slower. Ratios between what one job measures in turns, with bounds that leave room.

`make test` runs them last, when nothing else runs: of ranks that wait for a core one has the memory to itself, and ratios
tell nothing. Medians are compared, or the tenth best of all rounds if those are kinder: what is slower is slower in both.
"""

from __future__ import annotations

import json
import os

import numpy as np

from benchmarks import shards

from ..launch import ROOT, Job, mpiexec, python

BENCHMARKS = ROOT / "benchmarks"
KB, MB = 1 << 10, 1 << 20
SUM_TO_MEMORY = 0.6  # is 1.1 to 1.5 at 25 MB: below 1 if what was just added is not in the cache any more
SUM_TO_MPI = 1.5  # is 3.5 or more
SMALL_SUM_TO_MPI = 0.4  # is about 1 at 4 KB, 1.5 at 64 KB
COMPUTATION_TO_STEP = 0.33  # is 0.53 with 64 samples: 60 us of the runtime's to 70 of gradient and update

GATHER_TO_NPLOAD = 0.55  # is 1.0 or more at 28 x 28
CHUNKS_TO_DECOMPRESSION = 0.35  # is 0.6 at 28 x 28


def measured(command: list[str], tmp_path, **settings: object) -> dict:
    file = tmp_path / "found.json"
    own = {f"HPC_ELASTIC_{name.upper()}": str(value) for name, value in settings.items()}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HPC_ELASTIC_PROGRESS": "off", **own}
    command = [str(file) if word == "FILE" else word for word in command]
    with Job(command, folder=tmp_path, environ=environ) as job:
        done = job.wait()
    assert done.code == 0, done.err
    return json.loads(file.read_text())["seconds"]


def ratio(slower: list[float], faster: list[float]) -> float:
    return max(float(np.quantile(slower, at) / np.quantile(faster, at)) for at in (0.1, 0.5))


def test_sums_are_bound_by_the_memory_and_faster_than_those_of_mpi(tmp_path):
    job = [str(BENCHMARKS / "allreduce_job.py"), "FILE", "2", "15"]
    took = measured([*mpiexec(2), *job, *map(str, (4 * KB, 64 * KB, 25 * MB))], tmp_path)
    large = took[str(25 * MB)]
    assert ratio(large["memory"], large["in place"]) > SUM_TO_MEMORY
    assert ratio(large["mpi"], large["in place"]) > SUM_TO_MPI
    for nbytes in (4 * KB, 64 * KB):
        small = took[str(nbytes)]
        assert ratio(small["mpi"], small["in place"]) > SMALL_SUM_TO_MPI, f"{nbytes} bytes"


def test_a_step_costs_little_besides_its_computation(tmp_path):
    job = [str(BENCHMARKS / "step_job.py"), "FILE", "200", "8:64:10"]
    (took,) = measured([*python(), *job], tmp_path, microbatches=1)
    assert ratio(took["alone"], took["elastic"]) > COMPUTATION_TO_STEP


def test_shards_are_read_about_as_fast_as_memory_and_codec_allow(tmp_path, monkeypatch):
    monkeypatch.setitem(shards.SAMPLES, "28", 10_000)
    contiguous = shards.contiguous_seconds("28", tmp_path, rounds=30)
    assert ratio(contiguous["npload"], contiguous["ours"]) > GATHER_TO_NPLOAD
    chunked, _ = shards.chunked_seconds("28", tmp_path, rounds=30)
    assert ratio(chunked["pure"], chunked["ours"]) > CHUNKS_TO_DECOMPRESSION
