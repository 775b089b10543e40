"""Where checkpoints are: each appears by one rename, is checked before it is used, and goes when there are newer ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from .. import faults
from ..errors import CheckpointError
from . import manifest as manifests
from . import parts as hdf5
from .files import UnreadableError, appearing, put, sync
from .manifest import About, Manifest
from .parts import Array, Part, Rows
from .saved import FINISHED, Checkpoint, listed, place

UNFINISHED = re.compile(rf"\.{FINISHED.pattern}\.unfinished")
DAMAGED = re.compile(rf"{FINISHED.pattern}\.damaged")


class _Written(msgspec.Struct, frozen=True):
    """Left by a rank whose part is complete."""

    generation: int
    part: Part


class Store:
    """A folder of checkpoints, which need not exist yet.

    Parameters
    ----------
    folder : Path
        Where they are.
    keep : int
        How many are kept.
    on_damage : callable, optional
        Told of each damaged checkpoint that was found: its folder, and what is wrong.
    """

    def __init__(self, folder: Path, keep: int = 3, on_damage: Callable[[Path, str], None] | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._on_damage = on_damage

    # --- writing ------------------------------------------------------------------------------------------------------

    def write_part(self, about: About, part: int, header: bytes, arrays: Sequence[Array], rows: Sequence[Rows]) -> None:
        """Write one part of the checkpoint `about`; `header` and `arrays` are given for one part alone.

        Raises
        ------
        OSError
            If it can't be written.
        CheckpointError
            If an array can't be stored.
        """
        folder = self._folder_of(about)
        sign = folder / f"part-{part}.json"
        sign.unlink(missing_ok=True)
        written = hdf5.write(folder / f"part-{part}.h5", part, header, arrays, rows)
        with appearing(sign) as descriptor:
            put(descriptor, 0, msgspec.json.encode(_Written(about.generation, written)))

    def give_up(self, about: About, part: int, why: str) -> None:
        """Tell the process that commits that one part will not come; `why` is for people."""
        with contextlib.suppress(OSError):
            self._folder_of(about)
            self._sign(about, part).touch(mode=0o600)
            self._sign(about, part).write_text(why)

    def given_up(self, about: About, parts: Iterable[int]) -> str | None:
        """Return why a part will not come, as far as that could be written down; None if none is given up."""
        for part in parts:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                return self._sign(about, part).read_text()
        return None

    def _sign(self, about: About, part: int) -> Path:
        return self._unfinished(about) / f"part-{part}-{about.generation}.failed"

    def ready(self, about: About, parts: Iterable[int]) -> bool:
        """Tell whether all `parts` of the checkpoint `about` are complete."""
        return all(self._written(about, part) for part in parts)

    def commit(self, about: About, parts: Iterable[int]) -> Path:
        """Make a checkpoint of `parts`, which are ready, and return its folder. Of the same one, a good one stays.

        Raises
        ------
        OSError
            If it can't be written.
        CheckpointError
            If a part is missing, or the parts don't make a whole.
        """
        there = {part: self._written(about, part) for part in sorted(set(parts))}
        manifest = Manifest(about=about, parts=tuple(part for part in there.values() if part))
        missing = [f"part {number} is not ready" for number, part in there.items() if not part]
        problem = "; ".join(missing) or manifest.problem()
        if problem:
            raise CheckpointError(f"{self.folder / about.name} can't be made: {problem}")
        finished = self.folder / about.name
        faults.at("manifest")
        if not self._is_there(about):
            self._finish(manifest)
        self._prune(about)
        return finished

    def _finish(self, manifest: Manifest) -> None:
        unfinished, finished = self._unfinished(manifest.about), self.folder / manifest.about.name
        with appearing(unfinished / manifests.FILE) as descriptor:
            put(descriptor, 0, manifests.encode(manifest))
        for path in unfinished.iterdir():
            if path.name not in {manifests.FILE, *(part.file for part in manifest.parts)}:
                path.unlink(missing_ok=True)
        sync(unfinished)
        if os.path.lexists(finished):
            _set_aside(finished)
        unfinished.rename(finished)
        sync(self.folder)

    def discard(self, about: About) -> None:
        """Remove what there is of the unfinished checkpoint `about`."""
        shutil.rmtree(self._unfinished(about), ignore_errors=True)

    def clean(self, but: About | None = None) -> None:
        """Remove all unfinished checkpoints, `but` this one: parts can come after theirs was given up.

        As far as that is possible. For when nobody writes another one.
        """
        with contextlib.suppress(CheckpointError):
            for path in listed(self.folder, UNFINISHED):
                if but is None or path != self._unfinished(but):
                    shutil.rmtree(path, ignore_errors=True)

    def _unfinished(self, about: About) -> Path:
        return self.folder / f".{about.name}.unfinished"

    def _folder_of(self, about: About) -> Path:
        """Return where the checkpoint `about` is written; made if it is not there."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self._unfinished(about)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _written(self, about: About, part: int) -> Part | None:
        """Return what a part holds, or None while it is not complete, or a leftover of other members."""
        try:
            content = (self._unfinished(about) / f"part-{part}.json").read_bytes()
            written = msgspec.json.decode(content, type=_Written)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return written.part if written.generation == about.generation else None

    def _is_there(self, about: About) -> bool:
        """Tell whether the checkpoint `about` is there already, and good."""
        try:
            other = Checkpoint.open(self.folder / about.name)
        except CheckpointError:
            return False
        return _same_job(other.about, about) and not other.problems()

    def _prune(self, about: About) -> None:
        for path in listed(self.folder, UNFINISHED):
            if place(path) <= about.place:  # a leader that leaves can be done with one when the next one has begun
                shutil.rmtree(path, ignore_errors=True)
        others = [path for path in self.all() if path.name != about.name]
        for path in others[: max(0, len(others) + 1 - self._keep)]:
            # Hidden first: half of a checkpoint must not look like one.
            with contextlib.suppress(OSError):
                path = path.rename(path.with_name(f".{path.name}.unfinished"))  # noqa: PLW2901
            shutil.rmtree(path, ignore_errors=True)
        oldest = min(map(place, self.all()), default=about.place)
        for path in listed(self.folder, DAMAGED):
            if place(path) < oldest:
                shutil.rmtree(path, ignore_errors=True)

    # --- reading ------------------------------------------------------------------------------------------------------

    def all(self) -> list[Path]:
        """Return the folders of all checkpoints, oldest first; they may be damaged."""
        return listed(self.folder, FINISHED)

    def newest(self, than: tuple[int, int] = (0, -1)) -> Checkpoint | None:
        """Return the newest good checkpoint that is newer `than` a loop and step, or None. All of its files are read.

        Those that are damaged are passed over and renamed to ``NAME.damaged``.

        Raises
        ------
        CheckpointError
            If this process can't read the newest, for reasons that say nothing about it.
        """
        for at, path in sorted(((_true_place(path), path) for path in self.all()), reverse=True):
            if at <= than:
                return None
            try:
                checkpoint = Checkpoint.open(path)
                problems = checkpoint.problems()
            except UnreadableError:
                raise
            except CheckpointError as error:
                problems = [str(error)]
            if not problems:
                return checkpoint
            if os.path.lexists(path):  # it may have been pruned meanwhile
                if self._on_damage:
                    self._on_damage(path, "; ".join(problems))
                with contextlib.suppress(OSError):
                    _set_aside(path)
        return None


def _true_place(path: Path) -> tuple[int, int]:
    """Return loop and step, from the manifest if it is good."""
    try:
        return manifests.read(path).about.place
    except CheckpointError:
        return place(path)


def _same_job(one: About, other: About) -> bool:
    def encoded(about: About) -> bytes:
        return msgspec.json.encode((about.names, about.settings, about.cursor), order="deterministic")

    return encoded(one) == encoded(other)


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
