"""The manifest of a checkpoint: what it is of, and what its parts hold. What can't be right is refused as it is read."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from ..errors import CheckpointError
from ..model import Cursor
from .files import Natural, reading
from .parts import Part, RowsSpan

FORMAT = 1
FILE = "manifest.json"
MOST_BYTES = 1 << 30  # of a manifest; checkpoints of petabytes have less


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is of. All ranks that write a part of it say the same, but for ``time`` and ``notes``.

    Attributes
    ----------
    loop : int
        Which of the job's loops it was taken in.
    cursor : Cursor
        What was consumed until then.
    names : tuple of str
        What the job has registered.
    settings : dict
        Those settings that the bits depend on.
    generation : int
        Generation of the members that wrote it.
    time : float
        When it was taken, in seconds since the Unix epoch.
    notes : dict
        The runtime's own business: what msgpack can hold.
    """

    loop: Natural
    cursor: Cursor
    names: tuple[str, ...]
    settings: dict[str, Any]
    generation: int
    time: float
    notes: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.loop:02d}-{self.cursor.step:09d}"

    @property
    def place(self) -> tuple[int, int]:
        """Loop and step: the order of checkpoints."""
        return self.loop, self.cursor.step


class Form(NamedTuple):
    """Global shape and dtype of a distributed array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is said of a checkpoint."""

    about: About
    parts: tuple[Part, ...]

    @property
    def state(self) -> Part:
        """The part with the registered state."""
        return next((part for part in self.parts if part.has_state), self.parts[0])

    def forms(self) -> dict[str, Form]:
        """Return the distributed arrays, by name."""
        return {span.name: Form(span.total, np.dtype(span.dtype)) for part in self.parts for span in part.rows}

    def rows(self, name: str) -> list[tuple[RowsSpan, Part]]:
        """Return where the rows of array `name` are, in their order."""
        found = [(span, part) for part in self.parts for span in part.rows if span.name == name]
        return sorted(found, key=lambda each: (each[0].start, each[0].stop))

    def problem(self) -> str:
        """Return what can't be right about it, or nothing."""
        if not self.parts or len({part.number for part in self.parts}) < len(self.parts):
            return "it has no parts, or one twice"
        for part in self.parts:
            if not all(span.sound(part.size) for span in part.spans):
                return f"what is said of {part.file} contradicts itself"
        if sum(part.has_state for part in self.parts) > 1:
            return "more than one part has a state"
        for name, form in self.forms().items():
            at = 0
            for span, part in self.rows(name):
                if (span.total, span.dtype) != (form.shape, form.dtype.str):
                    return f"{part.file} has {name!r} with another shape or dtype than other parts"
                if span.start > at:
                    break
                at = max(at, span.stop)
            if at < form.shape[0]:
                return f"row {at} of {name!r} is in no part"
        return ""


class _Content(Manifest, frozen=True, kw_only=True):
    notes: bytes  # of `about`, in msgpack: JSON has neither NaN nor infinity


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    sha256: str
    content: msgspec.Raw


def encode(manifest: Manifest) -> bytes:
    """Return `manifest` as JSON, with its version and checksum."""
    about = msgspec.structs.replace(manifest.about, notes={})
    notes = msgspec.msgpack.encode(manifest.about.notes)
    content = msgspec.json.encode(_Content(about=about, parts=manifest.parts, notes=notes))
    return msgspec.json.encode(_Envelope(FORMAT, hashlib.sha256(content).hexdigest(), msgspec.Raw(content)))


def read(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint in `folder`.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, of another version, or can't be right.
    """
    path = folder / FILE
    with reading(path) as file, open(file.descriptor, "rb", closefd=False) as stream:
        data = stream.read(MOST_BYTES)
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
        if envelope.format != FORMAT:
            raise CheckpointError(f"{path} has format {envelope.format}, this version of hpc_elastic reads {FORMAT}")
        if hashlib.sha256(envelope.content).hexdigest() != envelope.sha256:
            raise CheckpointError(f"{path} is damaged, its checksum differs")
        content = msgspec.json.decode(envelope.content, type=_Content)
        notes = msgspec.msgpack.decode(content.notes, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    problem = content.problem()
    if problem:
        raise CheckpointError(f"{path} can't be right: {problem}")
    return Manifest(about=msgspec.structs.replace(content.about, notes=notes), parts=content.parts)
