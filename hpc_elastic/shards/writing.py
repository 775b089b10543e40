"""Writing shards."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import ShardError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def write_shard(
    path: str | Path, arrays: Mapping[str, NDArray[Any]], *, classes: Sequence[str] = (), overwrite: bool = False
) -> None:
    """Write `arrays`, [n, ...] each and of a fixed dtype, as a shard with the names `classes` of the labels 0, 1, ...

    The whole file appears under its name, or nothing.

    Raises
    ------
    ShardError
        If the arrays don't make a shard, the file is already there, or it can't be written.
    """
    path = Path(path)
    fields = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if len({array.shape[:1] for array in fields.values()}) != 1 or any(not array.ndim for array in arrays.values()):
        lengths = {name: list(array.shape[:1]) for name, array in fields.items()}
        raise ShardError(f"{path}: a shard needs one or more fields with the same number of samples, not {lengths}")
    for name, array in fields.items():
        if array.dtype.hasobject or array.dtype.kind in "UmM" or "/" in name:
            raise ShardError(f"{path}: field {name!r} of {array.dtype} can't be stored; use numbers or fixed-size bytes")
    if path.exists() and not overwrite:
        raise ShardError(f"{path} is already there: overwrite it explicitly, or choose another name")
    # Made in memory: where the disk is full, HDF5 fails as it closes the file and takes the process with it (SIGSEGV).
    with h5py.File(image := io.BytesIO(), "w") as file:
        for name, array in fields.items():
            file.create_dataset(name, data=array)
        if classes:
            file.attrs["classes"] = list(classes)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(image.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        raise ShardError(f"{path} can't be written, {error.strerror}: free space or choose another folder") from error
    finally:
        beside.unlink(missing_ok=True)
