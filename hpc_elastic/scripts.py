"""Whether Python can run a script, or a module by its name, so that what it can't run is refused before MPI starts."""

from __future__ import annotations

import importlib.util
import stat
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from .errors import LaunchError


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
        raise LaunchError(f"script {script} does not exist in {folder}: see to its name, or change to its folder") from error
    except OSError as error:
        raise LaunchError(f"script {script} can't be read: {error.strerror}; see to its permissions") from error


def _check_module(name: str, folder: Path) -> None:
    """As ``python -m`` looks for it, but no package is imported, be it as heavy as it likes."""
    top, *parts = name.split(".")
    path = [*([] if sys.flags.safe_path else [str(folder)]), *sys.path]
    spec = PathFinder.find_spec(top, path)
    with suppress(ValueError):  # no name
        spec = spec or importlib.util.find_spec(top)
    for part in parts:
        if spec is not None:
            package, spec = spec, PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
            if spec is None and _looks_elsewhere(package):
                return
    if spec is None:
        raise LaunchError(f"module {name} does not exist in {folder}, nor where Python has its packages: see to its name")
    inside = spec.submodule_search_locations
    if inside is not None and PathFinder.find_spec("__main__", list(inside)) is None:
        raise LaunchError(f"module {name} is a package without a module __main__: name one in it, as {name}.NAME")


def _looks_elsewhere(package: ModuleSpec) -> bool:
    """Tell whether a package may say itself, when it is imported, where its modules lie."""
    origin = Path(package.origin or "")
    return origin.suffix == ".py" and "__path__" in origin.read_text(errors="replace")
