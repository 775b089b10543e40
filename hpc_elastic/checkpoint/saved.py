"""A checkpoint that can be read: by any number of ranks, with whatever rows each of them wants."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from . import manifest as manifests
from .files import UnreadableError, reading
from .manifest import Form, Manifest
from .parts import Array, as_bytes

FINISHED = re.compile(r"([0-9]{2,})-([0-9]{9,})")


def listed(folder: Path, form: re.Pattern[str]) -> list[Path]:
    """Return what has a name of `form` in `folder`, by loop and step; nothing if there is no such folder."""
    try:
        names = os.listdir(folder)  # noqa: PTH208  (nothing but names)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read, {error.strerror}: name another folder") from error
    return sorted((folder / name for name in names if form.fullmatch(name)), key=place)


def place(path: Path) -> tuple[int, int]:
    """Return loop and step, from the name of a checkpoint."""
    loop, step = re.findall(r"[0-9]+", path.name)
    return int(loop), int(step)


class Checkpoint:
    """A checkpoint that can be read, by any number of ranks.

    Only the manifest is read at first. What is read later is compared with its checksums.

    Attributes
    ----------
    path : Path
        Its folder.
    about : About
        What it is of.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.about = manifest.about
        self._manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Return the checkpoint in the folder `path`.

        Raises
        ------
        CheckpointError
            If it has no good manifest; the message says what to do.
        """
        inside = listed(path, FINISHED)
        if inside:
            raise CheckpointError(f"{path} holds checkpoints but is none: name one of them, the newest is {inside[-1]}")
        try:
            return cls(path, manifests.read(path))
        except CheckpointError as error:
            raise type(error)(f"{path} is no good checkpoint, name another one: {error}") from error

    @property
    def header(self) -> bytes:
        """The header of the registered state."""
        part = self._manifest.state
        with reading(self.path / part.file, part.size) as file:
            return b"".join(piece.tobytes() for _, piece in file.pieces(part.header, 0, part.header.nbytes))

    def arrays(self) -> list[Array]:
        """Return the arrays of the registered state."""
        part = self._manifest.state
        found = []
        with reading(self.path / part.file, part.size) as file:
            for span in part.arrays:
                array = _empty(span.shape, np.dtype(span.dtype))
                target = as_bytes(array)
                for at, piece in file.pieces(span, 0, span.nbytes):
                    target[at : at + len(piece)] = piece
                found.append(array)
        return found

    def forms(self) -> dict[str, Form]:
        """Return shape and dtype of the distributed arrays, by name."""
        return self._manifest.forms()

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Return the rows ``[start, stop)`` of the distributed array `name`.

        Raises
        ------
        CheckpointError
            If there are none, or they can't be read.
        """
        form = self.forms().get(name)
        if form is None or not 0 <= start <= stop <= form.shape[0]:
            there = ", ".join(f"{other!r} {list(each.shape)}" for other, each in self.forms().items()) or "no arrays"
            raise CheckpointError(f"{self.path} has no rows {start} to {stop} of {name!r}, it has {there}")
        array = _empty((stop - start, *form.shape[1:]), form.dtype)
        target, size = as_bytes(array), form.row_bytes
        at = start
        for span, part in self._manifest.rows(name):
            end = min(stop, span.stop)
            if at < end:  # the manifest has no gaps
                with reading(self.path / part.file, part.size) as file:
                    for within, piece in file.pieces(span, (at - span.start) * size, (end - span.start) * size):
                        begin = (at - start) * size + within
                        target[begin : begin + len(piece)] = piece
                at = end
        return array

    def problems(self) -> list[str]:
        """Read all files and return what is wrong with them.

        Raises
        ------
        CheckpointError
            If this process can't read them, which says nothing about them.
        """
        found = []
        for part in self._manifest.parts:
            try:
                with reading(self.path / part.file, part.size) as file:
                    for span in part.spans:
                        for _ in file.pieces(span, 0, span.nbytes):
                            pass
            except UnreadableError:
                raise
            except CheckpointError as error:
                found.append(str(error))
        return found


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    try:
        return np.ndarray(shape, dtype)  # np.empty makes texts of no length longer
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"there is no memory for an array {dtype} {list(shape)}: {error}") from error
