"""The run directory: all control of a job goes through its files, and the file system's permissions are the security.

RUN/                 mode 0700
    config.json      settings of the attempt at hand, where they differ from the defaults
    events.jsonl     what happened (`hpc_elastic.events`)
    status.json      how it stands, rewritten by the leader
    failure.json     why it failed; the first rank that writes it wins
    launch.json      how it was started, with the settings that it last ran with, for `hpc-elastic resume`
    supervisor.lock  locked (flock) for as long as there is a supervisor
    attempts/N/      what earlier attempts left: their ranks/, newcomers/, condemned/, losses/, office.json, failure.json
    office.json      what the leader knows and its successor must, when the leader is lost
    ranks/ID.json    one record a process, written by itself
    ranks/ID.end.json  how its process ended, written by its guard
    ranks/ID.beat    touched by the process as a sign of life
    condemned/ID     put there by whoever judged a process lost; its guard kills it
    losses/N/        what the survivors of loss N agree on
    checkpoints/     what restarts begin with (`hpc_elastic.checkpoint`)
    inbox/*.json     requests, put there by an atomic rename
    answers/*.json   what became of them
    companions/N.*   what the agent of companion N, another allocation, says; companions/N/ what it is to start
    warm/            what warm parents import (`hpc_elastic.warm`); of each: HOST.sock, HOST.lock, HOST.log, HOST.refused
    newcomers/       what newcomers are told and what they report, before they are connected by MPI
    ledger/          consumed samples, if asked for
    fit-N.json       the history of the Keras `fit` that was loop N, for ranks that come later
    tensorboard/     the log that `hpc-elastic tensorboard` writes
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Mapping  # msgspec needs it
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from . import locks
from .encoding import decoded, encoded
from .errors import RunDirectoryError
from .model import Member, Request, numbers
from .places import unused_below

T = TypeVar("T")
ATTEMPT = ("newcomers", "condemned", "losses", "ranks")  # folders that each attempt at a job has of its own
HALF_WRITTEN = re.compile(r"\..+\.([0-9a-f]{8}|[0-9a-f]{16}|[0-9]+)(\.[0-9a-f]{8})?")
PARTS = ("inbox", "answers", "companions", "warm", *ATTEMPT)


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How a run stands. ``state`` is "starting", "running", "ended", "stopped" or "failed"; ``time`` is of this report.

    ``unit`` is what ``samples_per_s`` counts: "samples", or "turns" in a job without a data set.
    """

    state: str
    time: float
    started: float
    generation: int = 0
    ranks: int = 0
    members: tuple[Member, ...] = ()
    parked: int = 0
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    samples_per_s: float = 0.0
    unit: str = "samples"
    metrics: Mapping[str, float | None] = {}
    under_way: str = ""
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "metrics", numbers(self.metrics))


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run failed.

    ``kind`` is "error" (the program's own: a restart would not help), "lost" (a restart from the last checkpoint may help)
    or "interrupted".
    """

    error: str
    traceback: str
    member: int
    rank: int
    host: str
    generation: int
    step: int
    told: bool = False
    kind: str = "error"
    time: float = msgspec.field(default_factory=time.time)


class RankRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a process says of itself.

    ``outcome`` is "member", "parked", "retired", "cancelled", "ended" or "failed".
    """

    member: Member
    outcome: str
    time: float
    error: str = ""
    peak_bytes: int = 0


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended, as its guard saw it; ``signal`` is 0 if it ended by itself."""

    member: int
    pid: int
    host: str
    code: int
    signal: int
    time: float
    peak_bytes: int
    last_words: str

    def how(self) -> str:
        """Return that in words."""
        return f"was killed by signal {self.signal}" if self.signal else f"ended with exit code {self.code}"


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request."""

    accepted: bool
    text: str


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How a run was started: ``script`` is a file, or the name of a module, in ``directory``; ``mpi`` is the MPI's title.

    ``settings`` are those given outside the script, however they were given.
    """

    script: str
    module: bool
    arguments: list[str]
    settings: dict[str, Any]
    directory: str
    mpi: str


class RunDirectory:
    """An existing run directory.

    Parameters
    ----------
    path : Path
        The directory.

    Raises
    ------
    RunDirectoryError
        If `path` is not a run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if not (self.path / "ranks").is_dir():
            raise RunDirectoryError(f"{path} is not a run directory; `hpc-elastic run` makes one and prints its name")
        self.events = self.path / "events.jsonl"
        self.ledger = self.path / "ledger"
        self.newcomers = self.path / "newcomers"
        self.tensorboard = self.path / "tensorboard"
        self._failure = self.path / "failure.json"
        self._status = self.path / "status.json"
        self._inbox = self.path / "inbox"
        self._answers = self.path / "answers"

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make the run directory `path`, for its owner alone; an existing one must be empty."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            if any(path.iterdir()):
                raise RunDirectoryError(f"run directory {path} is already used: name another one, or remove it")
            path.chmod(0o700)
            for name in PARTS:
                (path / name).mkdir(mode=0o700)
        except OSError as error:
            raise RunDirectoryError(f"run directory {path} can't be made: {error.strerror}") from error
        return cls(path)

    @classmethod
    def create_below(cls, parent: Path, name: str) -> RunDirectory:
        """Make a run directory with a name of its own below `parent`."""
        return cls.create(unused_below(parent, name))

    # --- values in files -------------------------------------------------------------------------------------------

    def put(self, path: Path, value: msgspec.Struct | Mapping[str, Any]) -> None:
        """Write `value` to `path` so that a reader sees the old file or the new one, never a part."""
        self._put_beside(path, value).rename(path)

    def _put_beside(self, path: Path, value: msgspec.Struct | Mapping[str, Any]) -> Path:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(encoded(value))
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        return beside

    def get(self, path: Path, kind: type[T]) -> T | None:
        """Return the value in `path`, or None if there is no such file."""
        try:
            return decoded(path.read_bytes(), kind)
        except FileNotFoundError:
            return None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{path} is damaged: {error}") from error
        except OSError as error:
            raise RunDirectoryError(f"{path} can't be read: {error.strerror}") from error

    def remove_unused(self) -> None:
        """Remove a run directory in which nothing ran, as far as others have put nothing there."""
        for name in ("config.json", "launch.json", "supervisor.lock"):
            (self.path / name).unlink(missing_ok=True)
        for path in (self.path / "ranks").glob("*.end.json"):
            path.unlink()
        with contextlib.suppress(OSError):
            for name in PARTS:
                (self.path / name).rmdir()
            self.path.rmdir()

    def put_status(self, status: Status) -> None:
        """Replace the status."""
        self.put(self._status, status)

    def status(self) -> Status | None:
        """Return the status, or None while there is none."""
        return self.get(self._status, Status)

    def put_record(self, record: RankRecord) -> None:
        """Replace the record of one process."""
        self.put(self.path / "ranks" / f"{record.member.id}.json", record)

    def record(self, member: int) -> RankRecord | None:
        """Return the record of process `member`, or None."""
        return self.get(self.path / "ranks" / f"{member}.json", RankRecord)

    def records(self) -> list[RankRecord]:
        """Return the records of all processes that ever were in the job, by their ids."""
        files = (path for path in (self.path / "ranks").glob("[0-9]*.json") if path.stem.isdecimal())
        found = [self.get(path, RankRecord) for path in files]
        return sorted((record for record in found if record), key=lambda record: record.member.id)

    def end_of(self, member: int) -> End | None:
        """Return how process `member` ended, or None if its guard has not said so."""
        return self.get(self.path / "ranks" / f"{member}.end.json", End)

    def beat_file(self, member: int) -> Path:
        """Return the file that process `member` touches as a sign of life."""
        return self.path / "ranks" / f"{member}.beat"

    def history(self, loop: int) -> Path:
        """Return the file for the history of the Keras `fit` that was loop number `loop`."""
        return self.path / f"fit-{loop}.json"

    def ends(self) -> list[End]:
        """Return how processes ended, the first to end first, as far as their guards have said so."""
        files = [path for path in (self.path / "ranks").glob("*.end.json") if not path.name.startswith(".")]
        return sorted((end for path in files if (end := self.get(path, End))), key=lambda end: end.time)

    def condemn(self, member: int) -> None:
        """Have process `member` killed by its guard."""
        (self.path / "condemned" / str(member)).touch(mode=0o600)

    def is_condemned(self, member: int) -> bool:
        """Tell whether process `member` was taken for lost."""
        return (self.path / "condemned" / str(member)).exists()

    # --- supervisor and attempts -----------------------------------------------------------------------------------

    def put_launch(self, launch: Launch) -> None:
        """Write down how the run is started."""
        self.put(self.path / "launch.json", launch)

    def launch(self) -> Launch | None:
        """Return how the run was started, or None if no supervisor did that."""
        return self.get(self.path / "launch.json", Launch)

    def lock(self) -> IO[bytes]:
        """Say that a supervisor is there, until the file is closed: by the kernel, should the supervisor be killed."""
        file = locks.take(self.path / "supervisor.lock")
        if file is None:
            raise RunDirectoryError(f"{self.path} is in use: its supervisor is at work")
        return file

    def is_supervised(self) -> bool:
        """Tell whether a supervisor is there, or might be."""
        return locks.is_taken(self.path / "supervisor.lock")

    def attempts(self) -> list[Path]:
        """Return the folders of the attempts that were put away, oldest first."""
        found = [path for path in (self.path / "attempts").glob("*") if path.name.isdecimal()]
        return sorted(found, key=lambda path: int(path.name))

    def attempt(self) -> int:
        """Return the number of the attempt at hand, from 1."""
        past = self.attempts()
        return int(past[-1].name) + 1 if past else 1

    def retire_attempt(self) -> int:
        """Put away what an attempt left, so that the next one begins clean, and return its number."""
        number = self.attempt()
        folder = self.path / "attempts" / str(number)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700)
        for name in ATTEMPT:
            fresh = self.path / f".{name}"
            fresh.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).rename(folder / name)
            fresh.rename(self.path / name)
        for socket in (folder / "newcomers").glob("*.sock"):
            socket.unlink()  # of guards that were killed
        for path in (self.path / "office.json", self._failure):  # the failure last: until then it looks like one that failed
            with contextlib.suppress(FileNotFoundError):
                path.rename(folder / path.name)
        return number

    def rests(self) -> list[Path]:
        """Return what processes that were killed leave: values half written, and sockets; some may still be in use."""
        folders = (self.path, *(self.path / name for name in PARTS), *(self.path / "losses").glob("[0-9]*"))
        found = [path for folder in folders for path in folder.glob(".*") if HALF_WRITTEN.fullmatch(path.name)]
        return [*found, *self.newcomers.glob("*.sock"), *(self.path / "warm").glob("*.sock")]

    def sweep(self) -> None:
        """Remove these; nobody may be writing."""
        for path in self.rests():
            path.unlink(missing_ok=True)

    # --- failure ---------------------------------------------------------------------------------------------------

    def fail(self, failure: Failure) -> bool:
        """Record why the job failed; False if another rank was first."""
        beside = self._put_beside(self._failure, failure)
        try:
            os.link(beside, self._failure)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        return True

    def failed(self) -> bool:
        """Tell whether the job has failed. Costs one look at the file system."""
        return self._failure.exists() or not self.path.is_dir()

    def failure(self) -> Failure | None:
        """Return why the job failed, or None."""
        return self.get(self._failure, Failure)

    # --- requests --------------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> str:
        """Put `request` into the inbox and return its name."""
        name = f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.json"
        self.put(self._inbox / name, request)
        return name

    def answer_to(self, name: str) -> Answer | None:
        """Return the answer to the request `name`, or None while there is none."""
        return self.get(self._answers / name, Answer)

    def requests(self) -> list[tuple[str, Request | None]]:
        """Return the names and contents of the requests waiting, oldest first; None for one that can't be read."""
        found: list[tuple[str, Request | None]] = []
        for name in sorted(
            entry.name for entry in os.scandir(self._inbox) if entry.is_file() and not entry.name.startswith(".")
        ):
            try:
                found.append((name, self.get(self._inbox / name, Request)))
            except RunDirectoryError:
                found.append((name, None))
        return found

    def answer(self, name: str, answer: Answer) -> None:
        """Answer the request `name` and take it from the inbox."""
        try:
            self.put(self._answers / name, answer)
        finally:
            with contextlib.suppress(OSError):  # not a file: it is passed over from now on
                (self._inbox / name).unlink(missing_ok=True)
