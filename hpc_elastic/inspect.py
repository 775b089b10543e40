"""What a set of shards holds, for people and for scripts: fields, samples, labels, files and their layout."""  # noqa: A005

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from .shards import ShardSet, open_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .shards import Field, Layout, ShardFile

LABEL = "label"
MOST_LABELS = 1000  # with more different values, the field is no class label
BLOCK = 1 << 20  # labels read at once


def describe(where: Sequence[str]) -> dict[str, Any]:
    """Return what the shards at `where` hold, as values that JSON can express.

    Parameters
    ----------
    where : sequence of str
        Files, folders or patterns, as `open_shards` takes them.

    Returns
    -------
    dict
        ``samples``; ``bytes`` of all samples and ``file_bytes`` of all files; ``fields`` with the ``shape``, ``dtype``
        and ``bytes`` of one sample; ``classes`` and ``labels``, the samples of each label, which is None if there are
        no class labels; ``files``; ``fingerprint``.

    Raises
    ------
    ShardError
        If the shards can't be read or don't make a set.
    """
    with open_shards(list(where)) as found:
        return {
            "samples": len(found),
            "bytes": len(found) * sum(field.nbytes for field in found.fields.values()),
            "file_bytes": sum(file.path.stat().st_size for file in found.files),
            "fields": {name: _field(field) for name, field in found.fields.items()},
            "classes": list(found.classes),
            "labels": _labels(found),
            "files": [_file(file) for file in found.files],
            "fingerprint": found.fingerprint,
        }


def _field(field: Field) -> dict[str, Any]:
    return {"shape": list(field.shape), "dtype": str(field.dtype), "bytes": field.nbytes}


def _file(file: ShardFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "samples": file.samples,
        "bytes": file.path.stat().st_size,
        "layouts": {name: _layout(layout) for name, layout in file.layouts.items()},
    }


def _layout(layout: Layout) -> dict[str, Any]:
    if layout.chunk:
        return {"kind": "chunked", "chunk": layout.chunk, "compression": layout.compression}
    return {"kind": "contiguous" if layout.offset is not None else "other", "chunk": None, "compression": ""}


def _labels(found: ShardSet) -> dict[str, int] | None:
    """Return the number of samples of each label, or None if `found` has no class labels."""
    field = found.fields.get(LABEL)
    if field is None or field.shape or field.dtype.kind not in "iu":
        return None
    # A set with this field alone, so that the images are not read as well.
    files = [replace(f, fields={LABEL: field}, layouts={LABEL: f.layouts[LABEL]}) for f in found.files]
    counts: dict[int, int] = {}
    with ShardSet(files) as alone:
        for start in range(0, len(alone), BLOCK):
            block = alone.gather(np.arange(start, min(start + BLOCK, len(alone))))[LABEL]
            values, times = np.unique(block, return_counts=True)
            for value, n in zip(values.tolist(), times.tolist(), strict=True):
                counts[value] = counts.get(value, 0) + n
            if len(counts) > MOST_LABELS:
                return None
    return {str(value): counts[value] for value in sorted(counts)}


def table(found: dict[str, Any]) -> None:
    """Print on stdout what `describe` returned."""
    # No markup or highlighting: paths and class names may hold brackets.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{found['samples']:,} samples, {decimal(found['bytes'])} of data in {len(found['files'])} "
        f"file{'s' if len(found['files']) != 1 else ''} of {decimal(found['file_bytes'])}"
    )
    console.print(f"fingerprint {found['fingerprint']}")

    fields = Table("field", "shape of a sample", "dtype", "bytes")
    for name, field in found["fields"].items():
        fields.add_row(
            _plain(name), " x ".join(map(str, field["shape"])) or "one value", field["dtype"], str(field["bytes"])
        )
    console.print(fields)

    if found["labels"] is not None:
        labels = Table("label", "class", "samples")
        for value, count in found["labels"].items():
            labels.add_row(value, _plain(_class(found["classes"], int(value))), f"{count:,}")
        console.print(labels)

    folders = {Path(file["path"]).parent for file in found["files"]}
    if len(folders) == 1:
        console.print(f"files in {folders.pop()}:")
    files = Table("file", "samples", "size", "layout")
    for file in found["files"]:
        name = file["path"] if folders else Path(file["path"]).name
        layouts = _plain(_layouts(file["layouts"]))
        files.add_row(_plain(name), f"{file['samples']:,}", decimal(file["bytes"]), layouts)
    console.print(files)


def _plain(text: str) -> Text:
    return Text(text, overflow="fold")


def _class(classes: list[str], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else ""


def _layouts(layouts: dict[str, dict[str, Any]]) -> str:
    """Return how the fields lie in a file: once if all lie alike."""
    texts = {name: _layout_text(layout) for name, layout in layouts.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name} {text}" for name, text in texts.items())


def _layout_text(layout: dict[str, Any]) -> str:
    if layout["kind"] != "chunked":
        return str(layout["kind"])
    return f"chunks of {layout['chunk']}" + (f", {layout['compression']}" if layout["compression"] else "")
