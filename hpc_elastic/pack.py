"""Packing: idx files, npz files and folders of images become shards that can be read fast.

All shards are written beside the output folder's, and moved there when the last one is complete.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import shutil
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ShardError
from .shards import write_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]
    Progress = Callable[[int, int], None]

# Two zero bytes, the type, the number of axes, their lengths, the data; all big-endian (yann.lecun.com/exdb/mnist).
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
SUFFIXES = {".png", ".jpg", ".jpeg"}
USUAL_NAMES = {"x": "image", "images": "image", "y": "label", "labels": "label"}
SHARDS = "shard-?????-of-?????.h5"
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Source:
    """Samples to be packed: how many, how to get those in [start, stop), and the names of their labels."""

    samples: int
    read: Callable[[int, int], Arrays]
    classes: tuple[str, ...] = ()


def pack(
    sources: Sequence[Path],
    out: Path,
    *,
    labels: Path | None = None,
    shards: int = 1,
    size: tuple[int, int] | None = None,
    gray: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Pack `sources` into shards ``shard-00000-of-00004.h5``, ... in the folder `out` and return their paths.

    Parameters
    ----------
    sources : sequence of Path
        One folder of PNG or JPEG images, whose sub-folders' sorted names are the classes 0, 1, ...; or idx files (also
        gzipped; labels if they have one axis, else images) and npz files, whose arrays are joined by their names.
    out : Path
        Folder for the shards; it is made if need be.
    labels : Path, optional
        Labels of the samples, if `sources` have none: an idx or npy file, or text with one whole number a line. Images
        of a folder are in the order of their names.
    shards : int
        Number of shards, of equal length but for one sample.
    size : tuple of int, optional
        Height and width to which images of a folder are scaled.
    gray : bool
        Whether images of a folder are turned into shades of gray, [height, width] instead of [height, width, 3].
    overwrite : bool
        Whether to replace the shards that are in `out`.
    progress : callable, optional
        Called after each shard with the samples done and their total.

    Raises
    ------
    ShardError
        If a source can't be read or does not fit the others, or `out` can't be written. No shard of this call is left.
    """
    if not sources:
        raise ShardError("nothing to pack: name idx files, npz files, or a folder of images")
    for path in [*sources, *([labels] if labels else [])]:
        if not path.exists():
            raise ShardError(f"{path} does not exist: correct the path")
    folders = [path for path in sources if path.is_dir()]
    if folders and len(sources) > 1:
        raise ShardError(f"{folders[0]} is a folder, which can't be joined with other sources: pack it by itself")
    if folders:
        source = _images(folders[0], size, gray=gray, labelled=labels is not None)
    elif size or gray:
        raise ShardError(f"{sources[0]} is not a folder of images: size and gray are for those")
    else:
        source = _arrays(sources)
    if labels:
        source = _with_labels(source, read_labels(labels), labels)
    return write_shards(source, out, shards, overwrite=overwrite, progress=progress)


def write_shards(
    source: Source, out: Path, shards: int = 1, *, overwrite: bool = False, progress: Progress | None = None
) -> list[Path]:
    """Write `source` as shards into the folder `out` and return their paths: all of them, or none.

    Raises
    ------
    ShardError
        If there are too few samples, shards are already there, or they can't be written.
    """
    n = source.samples
    if not 1 <= shards <= min(n, 99999):
        raise ShardError(f"{n} samples can't make {shards} shards: ask for a number from 1 to {min(n, 99999)}")
    old = sorted(out.glob("*.h5"))
    replaced = sorted(out.glob(SHARDS)) if overwrite else []
    if len(old) > len(replaced):
        other = next(path for path in old if path not in replaced)
        raise ShardError(f"{other} is already in {out}, and would be read with the new shards: overwrite or move it")
    beside = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    moved: list[Path] = []
    try:
        beside.mkdir(parents=True)
        names = [f"shard-{i:05}-of-{shards:05}.h5" for i in range(shards)]
        for i, name in enumerate(names):
            start, stop = n * i // shards, n * (i + 1) // shards
            write_shard(beside / name, source.read(start, stop), classes=source.classes)
            if progress:
                progress(stop, n)
        out.mkdir(parents=True, exist_ok=True)
        for path in replaced:
            path.unlink()
        # Should the process die in here, open_shards sees by the names that some are missing.
        for name in names:
            moved.append((beside / name).replace(out / name))  # noqa: PERF401 - if one fails, those before must go
    except BaseException as error:
        for path in moved:
            path.unlink()
        if isinstance(error, OSError):
            raise ShardError(f"shards can't be written to {out}, {error.strerror}: choose another folder") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return moved


def arrays_source(arrays: Arrays, classes: Sequence[str] = ()) -> Source:
    """Return a source of `arrays` in memory; all have the same first axis."""
    samples = len(next(iter(arrays.values())))
    return Source(samples, lambda a, b: {name: array[a:b] for name, array in arrays.items()}, tuple(classes))


def read_idx(path: Path) -> NDArray[Any]:
    """Return the array in an idx file, gzipped or not, in the byte order of this machine.

    Raises
    ------
    ShardError
        If it is not an idx file, or truncated.
    """
    data = _content(path)
    zeros, kind, ndim = struct.unpack(">HBB", data[:4].ljust(4, b"\xff"))
    if zeros or kind not in IDX_TYPES or not ndim:
        raise ShardError(f"{path} is neither an idx file nor an npz file nor a folder of images: convert it to one")
    begin = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", data[4:begin]) if len(data) >= begin else (0,)
    dtype = np.dtype(IDX_TYPES[kind])
    expected = begin + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ShardError(f"{path} has {len(data)} bytes, not the {expected} of its header: copy or download it again")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape).astype(dtype.newbyteorder("="))


def read_labels(path: Path) -> NDArray[np.int64]:
    """Return the labels in an idx file (gzipped or not), an npy file, or a text with one whole number a line.

    Raises
    ------
    ShardError
        If they can't be read, or are not one row of whole numbers.
    """
    data = _content(path)
    if data[:2] == b"\0\0":
        labels = read_idx(path)
    else:
        try:
            labels = np.load(io.BytesIO(data)) if data[:6] == b"\x93NUMPY" else np.array(data.split(), dtype=np.int64)
        except UNREADABLE as error:
            raise ShardError(f"{path} holds no labels: give an idx, npy or text file of whole numbers") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise ShardError(f"{path} has {labels.dtype} {list(labels.shape)}: labels must be one row of whole numbers")
    return labels.astype(np.int64)


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            return file.read()
    except UNREADABLE as error:
        raise ShardError(f"{path} can't be read, copy or download it again: {error}") from error


def _read_npz(path: Path) -> Arrays:
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            names = {name: USUAL_NAMES.get(name.lower(), name) for name in file.files}
            if len(set(names.values())) < len(names):
                names = {name: name for name in names}
            arrays = {names[name]: np.asarray(file[name]) for name in names}
            return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    except UNREADABLE as error:
        raise ShardError(f"{path} is truncated, or not an npz file of plain arrays: save it again: {error}") from error


def _arrays(sources: Sequence[Path]) -> Source:
    parts: dict[str, list[tuple[Path, NDArray[Any]]]] = {}
    for path in sources:
        if zipfile.is_zipfile(path) or path.suffix == ".npz":
            arrays = _read_npz(path)
        else:
            array = read_idx(path)
            arrays = {"label" if array.ndim == 1 else "image": array}
        for name, array in arrays.items():
            parts.setdefault(name, []).append((path, array))
    if not parts:
        raise ShardError(f"{sources[0]} has no arrays: save some into it")
    fields = {name: _joined(name, pieces) for name, pieces in parts.items()}
    lengths = {name: len(array) for name, array in fields.items()}
    if len(set(lengths.values())) > 1:
        where = ", ".join(map(str, sources))
        raise ShardError(f"{where}: arrays of different lengths, {lengths}: pack those that belong together")
    label = fields.get("label")
    if label is not None and label.ndim == 1 and label.dtype.kind in "iub":
        fields["label"] = label.astype(np.int64)
    return arrays_source(fields)


def _joined(name: str, pieces: Sequence[tuple[Path, NDArray[Any]]]) -> NDArray[Any]:
    first, model = pieces[0]
    for path, array in pieces:
        if not array.ndim:
            raise ShardError(f"{path}: {name!r} is a single value, not an array of samples: leave it out")
        if (array.shape[1:], array.dtype) != (model.shape[1:], model.dtype):
            here, there = (f"{each.dtype} {list(each.shape)}" for each in (array, model))
            raise ShardError(f"{path}: {name!r} is {here}, but {there} in {first}: pack them apart")
    return model if len(pieces) == 1 else np.concatenate([array for _, array in pieces])


def _with_labels(source: Source, labels: NDArray[np.int64], path: Path) -> Source:
    if "label" in source.read(0, min(1, source.samples)):
        raise ShardError(f"{path}: the samples already have labels; leave one of both out")
    if len(labels) != source.samples:
        raise ShardError(f"{path} has {len(labels)} labels for {source.samples} samples: give the file that fits")
    return Source(source.samples, lambda a, b: {**source.read(a, b), "label": labels[a:b]}, source.classes)


def _listed(folder: Path, *, images: bool) -> list[Path]:
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in found if (path.suffix.lower() in SUFFIXES if images else path.is_dir())]


def _images(folder: Path, size: tuple[int, int] | None, *, gray: bool, labelled: bool) -> Source:
    classes = [path.name for path in _listed(folder, images=False)]
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes or ["."]):
        found = _listed(folder / name, images=True)
        if not found:
            raise ShardError(f"{folder / name} has no PNG or JPEG images: add some, or remove the folder")
        paths += found
        labels += [label] * len(found)
    loose = _listed(folder, images=True) if classes else []
    if loose:
        raise ShardError(f"{loose[0]} is beside the folders of the classes: move it into one of them")
    if classes and labelled:
        raise ShardError(f"{folder} has sub-folders, whose names are the labels: leave the file of labels out")
    images = _Images(paths, size, gray=gray)
    truth = np.array(labels, dtype=np.int64)

    def read(start: int, stop: int) -> Arrays:
        return {"image": images.read(start, stop), **({"label": truth[start:stop]} if classes else {})}

    return Source(len(paths), read, tuple(classes))


class _Images:
    """Decodes images, all to the size and the mode that fit the whole set; the headers are looked at before."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None, *, gray: bool) -> None:
        self.paths = paths
        headers = [self._look(path) for path in paths]
        self.mode = "L" if gray or all(mode in ("1", "L") for _, mode in headers) else "RGB"
        self.size = size or headers[0][0]
        for path, (found, mode) in zip(paths, headers, strict=True):
            if mode[0] in "IF":
                raise ShardError(f"{path} has more than 8 bits a channel ({mode}): convert it to 8 bits")
            if not size and found != self.size:
                here, there = (f"{height} x {width}" for height, width in (found, self.size))
                raise ShardError(f"{path} is {here} (height x width), {paths[0]} is {there}: give a size to scale to")

    @staticmethod
    def _look(path: Path) -> tuple[tuple[int, int], str]:
        from PIL import Image

        try:
            with Image.open(path) as image:
                return (image.height, image.width), image.mode
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise ShardError(f"{path} is not an image that can be read, replace or remove it: {error}") from error

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the images [start, stop), [n, height, width] or [n, height, width, 3], dtype uint8."""
        from PIL import Image

        height, width = self.size
        out = np.empty((stop - start, height, width, *((3,) if self.mode == "RGB" else ())), dtype=np.uint8)
        for row, path in zip(out, self.paths[start:stop], strict=True):
            try:
                with Image.open(path) as image:
                    plain = image.convert(self.mode)
            except (*UNREADABLE, Image.DecompressionBombError) as error:
                raise ShardError(f"{path} is truncated or damaged, replace or remove it: {error}") from error
            row[:] = plain if plain.size == (width, height) else plain.resize((width, height), Image.Resampling.BILINEAR)
        return out
