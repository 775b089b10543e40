"""Slurm by its commands: squeue, sinfo, scontrol, sbatch, salloc and scancel, from 22.05 on."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...errors import SlurmError, SlurmRefused
from . import decoding, text
from .calls import Calls, Output, in_time
from .seen import Partition, QueuedJob, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

GRANTED = re.compile(r"Granted job allocation (\d+)")
ASKED = re.compile(r"job (?:allocation )?(\d+)")
GONE = re.compile(r"invalid job id|already (?:completing|completed|finished)", re.IGNORECASE)
SUBMIT_LIMIT_S = 30.0  # longer than a question's: an answer that is given up leaves a job that nobody knows


class Commands:
    """The implementation that works wherever Slurm's commands do; see `reading.Slurm`."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls or Calls()
        self._release = ""

    def _run(self, *args: str, stdin: str = "", limit_s: float | None = None) -> Output:
        limit_s = self._calls.limit_s if limit_s is None else limit_s
        output = in_time(args, self._calls.run(args, stdin, limit_s), limit_s)
        if output.code:
            raise text.refusal(args[0], output.stderr, output.code)
        return output

    def release(self) -> str:
        """Return the version of the commands, asked for once; it needs no slurmctld."""
        if not self._release:
            said = self._run("sinfo", "--version").stdout.decode()
            self._release = said.split()[-1] if said.split() else ""
        return self._release

    def snapshot(self) -> Snapshot:
        """Return all nodes and jobs: one sinfo, one squeue."""
        nodes = self._run("sinfo", "--all", "--Node", "--json")
        queue = self._run("squeue", "--all", "--json")
        return Snapshot(decoding.nodes(nodes.stdout, nodes.stderr), decoding.jobs(queue.stdout, queue.stderr))

    def partitions(self) -> tuple[Partition, ...]:
        """Return the partitions, from ``scontrol``'s text: it is the same in all versions."""
        lines = self._run("scontrol", "--all", "--oneliner", "show", "partition").stdout.decode().splitlines()
        return tuple(text.partition(line) for line in lines if line.startswith("PartitionName="))

    def config(self) -> dict[str, str]:
        """Return the cluster's configuration."""
        return text.settings(self._run("scontrol", "show", "config").stdout.decode(errors="replace"))

    def launch_ways(self) -> tuple[str, ...]:
        """Return how srun can start MPI, such as ``"pmi2"``."""
        output = self._run("srun", "--mpi=list")
        lines = (output.stdout.decode(errors="replace") + output.stderr).splitlines()
        words = [line.removeprefix("srun:").split() for line in lines if "types are" not in line]
        return tuple(word[0] for word in words if len(word) == 1 and word[0] not in {"none", "cray_shasta"})

    def own_job(self, number: int) -> QueuedJob | None:
        """Return one job; None if Slurm doesn't know it. By squeue, since scontrol has JSON for jobs from 24.05 on only."""
        try:
            output = self._run("squeue", "--all", f"--jobs={number}", "--json")
            jobs = decoding.jobs(output.stdout, output.stderr)
        except SlurmRefused as error:
            if GONE.search(str(error)):
                return None
            raise
        return next((job for job in jobs if job.id == number), None)

    def submit(self, script: str, options: Sequence[str] = ()) -> int:
        """Submit a script, handed over as standard input; after `SlurmUnreachable` its job may exist all the same."""
        said = self._run("sbatch", "--parsable", *options, stdin=script, limit_s=SUBMIT_LIMIT_S).stdout.decode().strip()
        number = said.splitlines()[-1].split(";")[0] if said else ""  # NUMBER or NUMBER;CLUSTER
        if not number.isdigit():
            raise SlurmError(f"sbatch gave no job number but {said!r}")
        return int(number)

    def allocate(self, options: Sequence[str] = (), *, limit_s: float = 60.0) -> int:
        """Wait for nodes with ``salloc --no-shell``, whose SIGTERM at the limit withdraws the request."""
        output = self._calls.run(("salloc", "--no-shell", *options), "", limit_s)
        granted = GRANTED.search(output.stderr)
        if granted and not output.late and output.code == 0:
            return int(granted[1])
        asked = ASKED.search(output.stderr)
        if asked:  # granted at the last moment, or left behind by a salloc that could not withdraw it
            self.cancel([int(asked[1])])
        if output.late and asked:
            raise SlurmRefused(f"salloc: job {asked[1]} got no nodes within {limit_s:g} s and is withdrawn; try later")
        in_time(("salloc",), output, limit_s)
        raise text.refusal("salloc", output.stderr, output.code)

    def cancel(self, numbers: Iterable[int]) -> None:
        """End jobs; those that are over or unknown are no error."""
        asked = [str(number) for number in numbers]
        if not asked:
            return
        args = ("scancel", *asked)
        output = in_time(args, self._calls.run(args), self._calls.limit_s)
        left = "\n".join(line for line in output.stderr.splitlines() if not GONE.search(line))
        if output.code and (left.strip() or not output.stderr.strip()):
            raise text.refusal("scancel", left, output.code)

    def update(self, number: int, fields: Mapping[str, str]) -> None:
        """Change a job, by the names of ``scontrol update``."""
        self._run("scontrol", "update", f"JobId={number}", *(f"{name}={value}" for name, value in fields.items()))
