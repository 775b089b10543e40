"""The one place that runs Slurm's commands: a list of arguments, no shell, a time limit, a clean environment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import msgspec

from ...errors import SlurmMissing, SlurmUnreachable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

END_S = 5.0  # time to withdraw a request in after SIGTERM, until SIGKILL

# Inside a job the variables of that job would become defaults of what is asked for, and sbatch would hand those of the
# launcher to the new job. What only says where Slurm is, stays.
FOREIGN = (
    "SLURM",
    "SBATCH_",
    "SALLOC_",
    "SQUEUE_",
    "SINFO_",
    "SCANCEL_",
    "SCONTROL_",
    "SRUN_",
    "PMI",
    "HYDI_",
    "OMPI_",
    "PRTE_",
)
WHERE = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})


class Output(msgspec.Struct, frozen=True):
    """What a command wrote, and how it ended; `late` if it was ended at its limit."""

    stdout: bytes
    stderr: str
    code: int
    late: bool = False


def clean(variables: Mapping[str, str]) -> dict[str, str]:
    """Return `variables` without what belongs to a job or a launcher, and with messages in English."""
    kept = {name: value for name, value in variables.items() if name in WHERE or not name.startswith(FOREIGN)}
    return kept | {"LC_ALL": "C"}


def environment() -> dict[str, str]:
    """Return the environment for Slurm's commands, and for what they start."""
    return clean(os.environ)


class Calls:
    """Runs commands.

    Parameters
    ----------
    limit_s : float
        Time that a command has. Slurm's own clients try for 9 s and more when slurmctld doesn't answer.
    """

    def __init__(self, limit_s: float = 5.0) -> None:
        self.limit_s = limit_s

    def run(self, args: Sequence[str], stdin: str = "", limit_s: float | None = None) -> Output:
        """Run a command to its end, or to its limit: then it is ended, with SIGTERM first, as salloc wants it.

        Raises
        ------
        SlurmMissing
            If there is no such command.
        """
        limit_s = self.limit_s if limit_s is None else limit_s
        try:
            process = subprocess.Popen(
                list(args),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(),
                start_new_session=True,  # a Ctrl-C at the terminal must not withdraw nodes, and what it starts ends with it
            )
        except OSError as error:
            raise SlurmMissing(
                f"{args[0]}: {error.strerror}. Slurm's commands are not on PATH: run this on a node of a cluster"
            ) from error
        with process:
            late = False
            try:
                out, err = process.communicate(stdin.encode(), timeout=limit_s)
            except subprocess.TimeoutExpired:
                late = True
                _signal(process, signal.SIGTERM)
                try:
                    out, err = process.communicate(timeout=END_S)
                except subprocess.TimeoutExpired:
                    _signal(process, signal.SIGKILL)
                    out, err = process.communicate()
            except BaseException:
                _signal(process, signal.SIGKILL)
                raise
        return Output(out, err.decode(errors="replace"), process.returncode, late)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a command and what it has started: of a site's own script that would hold the pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def in_time(args: Sequence[str], output: Output, limit_s: float) -> Output:
    """Return `output`; `SlurmUnreachable` if its command was ended at its limit."""
    if output.late:
        raise SlurmUnreachable(f"{args[0]} had no answer within {limit_s:g} s: slurmctld is down or slow; try again later")
    return output
