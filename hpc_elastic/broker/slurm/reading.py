"""The seam: all that hpc_elastic reads of Slurm and has it do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .seen import Partition, QueuedJob, Snapshot


class Slurm(Protocol):
    """A cluster.

    Each method can raise `SlurmMissing`, `SlurmUnreachable` (worth another try later) and `SlurmRefused` (not worth one
    unless something is changed). Options are those of sbatch and salloc.
    """

    def release(self) -> str:
        """Return the version of Slurm that is installed here, such as ``"22.05.8"``."""

    def snapshot(self) -> Snapshot:
        """Return all nodes and jobs, by one question for the nodes and then one for the jobs.

        In that order, a job that begins in between is seen to run, on nodes that were seen to be idle.
        """

    def partitions(self) -> tuple[Partition, ...]:
        """Return the partitions."""

    def config(self) -> dict[str, str]:
        """Return the cluster's configuration, as ``scontrol show config`` has it."""

    def own_job(self, number: int) -> QueuedJob | None:
        """Return one job; None if Slurm doesn't know it (any more)."""

    def submit(self, script: str, options: Sequence[str] = ()) -> int:
        """Submit a batch script and return the number of its job.

        After `SlurmUnreachable` the job **may exist all the same**: the answer was lost, not necessarily the request. So
        give it a name or comment of its own, and look for that in the next `snapshot` before it is submitted again.
        """

    def allocate(self, options: Sequence[str] = (), *, limit_s: float = 60.0) -> int:
        """Wait for nodes without starting anything on them, and return the number of the job that holds them.

        A request that is not granted within `limit_s` is withdrawn, and `SlurmRefused` raised. What `submit` says about
        `SlurmUnreachable` holds here too.
        """

    def cancel(self, numbers: Iterable[int]) -> None:
        """End jobs; those that are over or unknown are no error."""

    def update(self, number: int, fields: Mapping[str, str]) -> None:
        """Change a job, by the names that ``scontrol update`` has: ``{"TimeLimit": "30"}``."""
