"""What a warm parent imports, and for which newcomers that is right: functions of names, files' stamps and variables."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import msgspec

MPI = "mpi4py.MPI"
PACKAGE = Path(__file__).parent
WORTH = 1000  # modules; NumPy, h5py and this package have some 400, TensorFlow 3700, PyTorch 1500
# Variables that differ between processes of a job and that no import depends on.
OWN = (
    *("HPC_ELASTIC_", "_HPC_ELASTIC_", "PMI", "OMPI_", "PRTE_", "HYDI_", "HYDRA_", "MPI_", "MPIR_", "MPICH_", "UCX_"),
    *("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "CUDA_VISIBLE_DEVICES", "PWD", "OLDPWD", "SHLVL", "PYTEST_CURRENT_TEST"),
)

Stamp = tuple[int, int, int]  # inode, size in bytes, time of change in ns
# Modules whose `rehearse` the processes that wait to be newcomers call, with these arguments. Whoever knows what all ranks
# of the job have in common puts them here.
rehearsals: dict[str, dict[str, int]] = {}


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a warm parent is started with: modules' files, `rehearsals`, Python's `path`, its `command` and environment."""

    modules: dict[str, str]
    rehearsals: dict[str, dict[str, int]]
    path: list[str]
    command: list[str]
    environ: dict[str, str]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a newcomer's guard asks for, as `hpc_elastic.adoption.request` packs it."""

    executable: str
    package: str
    directory: str
    umask: int
    arguments: list[str]
    environ: dict[str, str]


def unpacked(data: bytes) -> Asked:
    """Return what a guard asks for.

    Raises
    ------
    ValueError
        If that is no request.
    """
    executable, package, directory, umask, count, *rest = data.split(b"\0")
    n = int(count)
    if n < 0 or n > len(rest):
        raise ValueError(f"a request of {n} arguments has {len(rest)} fields")
    variables = [entry.split(b"=", 1) for entry in rest[n:]]
    if any(len(pair) != 2 for pair in variables):  # noqa: PLR2004  (a name and a value)
        raise ValueError("a variable without a value")
    return Asked(
        executable=_text(executable),
        package=_text(package),
        directory=_text(directory),
        umask=int(umask),
        arguments=[_text(argument) for argument in rest[:n]],
        environ={_text(name): _text(value) for name, value in variables},
    )


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def outside() -> tuple[Path, ...]:
    """Return the folders of code that is not the user's own: Python's, installed packages, and this package."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = [*(sysconfig.get_path(name) for name in names), *site.getsitepackages(), site.getusersitepackages()]
    return (*(Path(path) for path in dict.fromkeys(found)), PACKAGE)


def preloadable(modules: Mapping[str, ModuleType], folders: Sequence[Path]) -> dict[str, str]:
    """Return the files of those `modules` that lie below `folders`, by name, in order, as far as they can go without MPI.

    Those of the user's own are left out, so that no newcomer runs code that has changed since, and those that hold MPI. A
    module is known by its specification, and is not touched otherwise: some load what they stand for when they are.
    """
    prefixes = tuple(f"{folder}/" for folder in folders)
    mpi = modules.get(MPI)
    found = dict[str, str]()
    for name, module in modules.items():
        held = _held(module)
        spec = held.get("__spec__")
        origin = getattr(spec, "origin", None)
        if getattr(spec, "name", None) != name or not isinstance(origin, str) or not origin.startswith(prefixes):
            continue
        if name in ("__main__", MPI) or (mpi is not None and any(value is mpi for value in held.values())):
            continue
        found[name] = origin
    return found


def _held(module: object) -> Mapping[str, object]:
    try:
        held: Mapping[str, object] = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return held


def stamps(modules: Mapping[str, str], path: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamps of this package's files, of those of `modules`, and of what `path` has for their packages now.

    What modules read besides their own file, such as data and libraries, is not among these.

    Parameters
    ----------
    modules : mapping
        File of each module, by name.
    path : iterable of str
        Where Python looks for packages.
    """
    mine = f"{PACKAGE.name}."
    tops = sorted({name.partition(".")[0] for name in modules} - {PACKAGE.name} - sys.stdlib_module_names)
    found = {str(file): _stamp(str(file)) for file in sorted(PACKAGE.rglob("*.py"))}
    for top in tops:
        for folder in path:
            for file in (f"{folder}/{top}/__init__.py", f"{folder}/{top}.py"):
                if (stamp := _stamp(file)) is not None:
                    found.setdefault(top, stamp)
    for name, file in modules.items():
        if name not in found and not name.startswith(mine):
            found[name] = _stamp(file)
    return {name: stamp for name, stamp in found.items() if stamp is not None}


def _stamp(file: str) -> Stamp | None:
    try:
        found = os.stat(file)  # noqa: PTH116  (of thousands, and a newcomer waits)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return those variables that imports may depend on: all but those known to be of one process."""
    return {name: value for name, value in environ.items() if not name.startswith(OWN) and name != "_"}


def mismatch(asked: Asked, born: Mapping[str, str], before: Mapping[str, Stamp], now: Mapping[str, Stamp]) -> str:
    """Return why a warm parent is not right for who asks, or nothing.

    Parameters
    ----------
    asked : Asked
        What is asked for.
    born : mapping
        The environment that the warm parent was started with.
    before, now : mapping
        Stamps of its files, when they were imported and now.
    """
    if asked.executable != sys.executable:
        return f"it runs {sys.executable}, and the newcomer {asked.executable}"
    if asked.package != str(PACKAGE):
        return f"it has imported {PACKAGE}, and the newcomer is of {asked.package}"
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        return f"{', '.join(changed[:3])} changed since it was imported"
    mine, theirs = variables(born), variables(asked.environ)
    differing = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    return f"the environment differs in {', '.join(differing[:3])}" if differing else ""
