"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hpc_elastic as he

NAMES = [
    "ArrayError",
    "CheckpointError",
    "ConfigError",
    "DistributedArray",
    "ElasticError",
    "Job",
    "JobError",
    "LaunchError",
    "LostRank",
    "MembershipError",
    "Microbatch",
    "RankError",
    "ResizeRefused",
    "Retired",
    "Rewound",
    "RunDirectoryError",
    "ShardError",
    "ShardSet",
    "Step",
    "StepError",
    "allgather",
    "allreduce",
    "broadcast",
    "keras",
    "open_shards",
    "run",
    "write_shard",
]


def test_the_public_names():
    assert he.__all__ == NAMES


def fresh(code):
    """Run `code` in a Python of its own, and end MPI if that has begun it: Open MPI would leave shared memory behind."""
    end = "import sys\nif 'mpi4py.MPI' in sys.modules:\n    from hpc_elastic.comm.world import finalize; finalize()"
    command = [sys.executable, "-W", "error", "-c", f"{code}\n{end}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_names_are_there():
    """In a Python of its own, which has none of them loaded before."""
    print_them = "; ".join(f"print(he.{name}.__name__)" for name in NAMES)
    assert fresh(f"import hpc_elastic as he; {print_them}") == [
        "hpc_elastic.keras" if name == "keras" else name for name in NAMES
    ]


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'hpc_elastic' has no attribute 'spawn'"):
        _ = he.spawn


def test_importing_costs_little():
    """Every rank pays for what is imported."""
    heavy = {"mpi4py", "h5py", "tensorflow", "keras", "rich", "typer", "numpy", "psutil", "PIL"}
    loaded = fresh("import sys, hpc_elastic; print(*sys.modules)")
    assert not heavy & set(loaded)
    loaded = fresh("import sys, hpc_elastic as he; he.run, he.Job; print(*sys.modules)")
    assert not {"h5py", "tensorflow", "keras", "rich", "typer", "PIL"} & set(loaded)


def test_a_rank_that_leaves_is_not_caught_by_except_exception():
    assert issubclass(he.Retired, BaseException)
    assert not issubclass(he.Retired, Exception)


def test_errors_form_one_tree():
    tree = {name: getattr(he, name) for name in NAMES if name.endswith("Error") or name == "ResizeRefused"}
    assert all(issubclass(error, he.ElasticError) for error in tree.values())
    assert issubclass(he.RankError, he.JobError)
    assert issubclass(he.MembershipError, he.JobError)
    drawn = sys.modules["hpc_elastic.errors"].__doc__
    assert all(name in drawn for name in tree)
