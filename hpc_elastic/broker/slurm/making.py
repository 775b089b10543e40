"""How a job comes to its Slurm broker: what its own allocation is, and what a companion's script does."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ...errors import ConfigError, SlurmRefused
from .broker import Limits, SlurmBroker
from .choosing import choose
from .companions import Files
from .desk import Desk
from .getting import AtOnce, Getting, Queued
from .wishes import Needs

if TYPE_CHECKING:
    from ...config import Config
    from ...model import Lease

NEEDS = "own.json"


def make(config: Config, run_path: Path, leases: tuple[Lease, ...]) -> SlurmBroker:
    """Return the broker of the run in `run_path`.

    Raises
    ------
    ConfigError
        If this is no Slurm job.
    SlurmMissing
        If Slurm's commands are not here.
    """
    files = Files(run_path)
    kept = _kept(files.folder / NEEDS)
    number = os.environ.get("SLURM_JOB_ID", "")
    if kept is None and not number.isdecimal():
        raise ConfigError(
            'broker = "slurm" needs a Slurm job: start it by `hpc-elastic submit` or from a batch script, or take '
            'broker = "local"'
        )
    slurm = choose().slurm
    host = kept.host if kept is not None else socket.gethostname()
    cpus = config.ranks_per_node * config.cores_per_rank
    options = shlex.split(config.slurm_options)

    def needs() -> Needs:
        own = slurm.own_job(kept.job if kept is not None else int(number))
        if own is None:
            if kept is None:
                raise SlurmRefused(f"Slurm does not know job {number}, in which this runs")
            return kept
        found = Needs.of(own, host, cpus, options)
        if found != kept:
            files.put(files.folder / NEEDS, msgspec.json.encode(found))
        return found

    getting: Getting = (
        AtOnce(run_path, files, config.patience_s) if config.companions == "salloc" else Queued(run_path, files, slurm)
    )
    limits = Limits(
        considerate=config.decides != "greedy",
        ranks_per_node=config.ranks_per_node,
        patience_s=config.patience_s,
        node_hours=config.node_hours,
        own_host=host,
    )
    return SlurmBroker(Desk(slurm, files, needs, getting), limits, leases)


def _kept(path: Path) -> Needs | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Needs)
    except (OSError, msgspec.MsgspecError):
        return None
