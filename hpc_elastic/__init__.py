"""hpc_elastic: elastic MPI jobs in Python.

Ranks come and go while the job runs, and what it computes keeps its bits. See `run`, `Job` and `open_shards`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    ArrayError,
    CheckpointError,
    ConfigError,
    ElasticError,
    JobError,
    LaunchError,
    LostRank,
    MembershipError,
    RankError,
    ResizeRefused,
    Retired,
    Rewound,
    RunDirectoryError,
    ShardError,
    StepError,
)

if TYPE_CHECKING:
    from . import keras
    from .redistribute import DistributedArray
    from .runtime.batches import Microbatch
    from .runtime.collective import allgather, allreduce, broadcast
    from .runtime.job import Job
    from .runtime.launch import run
    from .runtime.step import Step
    from .shards import ShardSet, open_shards, write_shard

__version__ = "0.1.0"

__all__ = [
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

# Loaded when they are first used: a rank pays for h5py, TensorFlow or MPI only where it needs them.
_LAZY = {
    "DistributedArray": "redistribute",
    "Job": "runtime.job",
    "Microbatch": "runtime.batches",
    "ShardSet": "shards",
    "Step": "runtime.step",
    "allgather": "runtime.collective",
    "allreduce": "runtime.collective",
    "broadcast": "runtime.collective",
    "open_shards": "shards",
    "run": "runtime.launch",
    "write_shard": "shards",
}


def __getattr__(name: str) -> object:
    import importlib

    if name == "keras":
        return importlib.import_module(".keras", __name__)
    if name in _LAZY:
        return getattr(importlib.import_module("." + _LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
