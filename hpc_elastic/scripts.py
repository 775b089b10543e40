"""Whether Python can run a script, or a module by its name, so that what it can't run is refused before MPI starts.

python -m hpc_elastic.scripts MODULE
"""

from __future__ import annotations

import stat
import subprocess
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from .errors import LaunchError

ABSENT, NO_MAIN = 3, 4  # exit codes


def check(script: str, folder: Path, *, module: bool) -> None:
    """See that Python, started in `folder`, can run `script`: a file, or with `module` the name of a module.

    Raises
    ------
    LaunchError
        If it can't.
    """
    if module:
        _check_module(script, folder)
    else:
        _check_file(script, folder)


def _check_file(script: str, folder: Path) -> None:
    path = folder / script
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise LaunchError(f"script {script} is a folder: name a file in it, or with -m a module")
        if not stat.S_ISREG(mode):
            raise LaunchError(f"script {script} is no regular file, which newcomers could read again: write it into one")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        where = "" if Path(script).is_absolute() else f" in {folder}"
        raise LaunchError(f"script {script} does not exist{where}: see to its name, or change to its folder") from error
    except OSError as error:
        raise LaunchError(f"script {script} can't be read: {error.strerror}; see to its permissions") from error


def _check_module(name: str, folder: Path) -> None:
    """Ask a Python that is started as the ranks will be: it has their path, and what serves editable installations."""
    command = [sys.executable, "-m", __name__, name]
    done = subprocess.run(command, cwd=folder, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode == ABSENT:
        raise LaunchError(
            f"module {name} does not exist in {folder}, nor where Python has its packages: see to its "
            "name, or change to its folder"
        )
    if done.returncode == NO_MAIN:
        raise LaunchError(f"module {name} is a package without a module __main__: name one in it, as {name}.NAME")


def find(name: str) -> int:
    """Look for a module as ``python -m`` does, but import no package, be it as heavy as it likes; return an exit code."""
    parts = name.split(".")
    package: ModuleSpec | None = None
    places: list[str] | None = None
    for number in range(1, len(parts) + 1):
        inside, full = package, ".".join(parts[:number])
        package = _spec(full, places)
        if package is None:
            return 0 if inside is not None and _looks_elsewhere(inside) else ABSENT
        places = package.submodule_search_locations
        if places is None:
            return 0 if number == len(parts) else ABSENT
        places = list(places)
        if full not in sys.modules:  # namespace packages ask for the one they are in
            sys.modules[full] = ModuleType(full)
            sys.modules[full].__path__ = places
    return 0 if _spec(f"{name}.__main__", places) is not None else NO_MAIN


def _spec(name: str, places: list[str] | None) -> ModuleSpec | None:
    found = (finder.find_spec(name, places) for finder in sys.meta_path)
    return next((spec for spec in found if spec is not None), None)


def _looks_elsewhere(package: ModuleSpec) -> bool:
    """Tell whether a package may say itself, when it is imported, where its modules lie."""
    origin = Path(package.origin or "")
    with suppress(OSError):
        return origin.suffix == ".py" and "__path__" in origin.read_text(errors="replace")
    return False


if __name__ == "__main__":
    sys.exit(find(sys.argv[1]))
