"""The job's settings: one typed struct, filled from defaults, the script, a TOML file, the environment, the command line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import ConfigError

PREFIX = "HPC_ELASTIC_"
FILE_VARIABLE = PREFIX + "CONFIG"
RUN_VARIABLE = PREFIX + "RUN"
SUPERVISED_VARIABLE = PREFIX + "SUPERVISED"
DOOR_VARIABLE = PREFIX + "DOOR"  # in newcomers: where their guard hands the launcher's gifts over
STDERR_VARIABLE = "_" + PREFIX + "STDERR"  # in guarded ranks: descriptor of the stderr that their guard has
GUARD_VARIABLE = "_" + PREFIX + "GUARD"  # in guarded ranks: pid of their guard
START_VARIABLE = "_" + PREFIX + "START"  # in newcomers: when their guard began, and how they were started
FAULT_VARIABLE = PREFIX + "FAULT"  # for tests: see `hpc_elastic.faults`
NOT_SETTINGS = {FILE_VARIABLE, RUN_VARIABLE, SUPERVISED_VARIABLE, DOOR_VARIABLE, FAULT_VARIABLE}

SHORT = {"min_ranks": "min", "max_ranks": "max"}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename=SHORT):
    """Settings of a job.

    In TOML, in ``he.run(train, ...)`` and in the environment (``HPC_ELASTIC_MAX=4``) the limits are called ``min`` and
    ``max``. A later source wins: defaults, the script's ``he.run``, the TOML file, the environment, the command line.

    Attributes
    ----------
    min_ranks, max_ranks : int
        Limits of the number of ranks. ``max`` 0 means as many as the broker has slots.
    ranks : int
        Ranks to grow to as soon as the job runs (policies ``manual`` and ``fixed``).
    policy : str
        ``manual`` (on request), ``fixed`` (keep ``ranks``), ``timetable``, ``greedy`` (take all there is) or ``considerate``
        (the same, but on Slurm nothing that a pending job could start with). ``auto`` is ``considerate`` with the broker
        ``slurm``, else ``manual``.
    timetable : str
        For the policy of that name: ``"20:3,40:2-0"`` is 3 ranks from step 20 on, then 2 from step 40 on, rank 0 leaving.
    broker : str
        ``local`` (this machine), ``script`` (a timetable of slots) or ``slurm`` (this host, and idle nodes of the cluster).
    supply : str
        For the broker ``script``: ``"0:1,20:3"`` is 1 slot at first and 3 from step 20 on.
    slots : int
        Slots of the broker ``local``. 0 counts the cores that this process may use.
    cores_per_rank, gpus_per_rank : int
        What a slot of the broker ``local`` holds.
    ranks_per_node : int
        With the broker ``slurm``: ranks on each node.
    patience_s : float
        With the broker ``slurm``: seconds that a node which was asked for is waited for.
    node_hours : float
        With the broker ``slurm``: node-hours that may be used besides the job's own allocation; 0 for no limit.
    slurm_options : str
        With the broker ``slurm``: further options of salloc (or sbatch) for the nodes that are asked for.
    companions : {"salloc", "sbatch"}
        With the broker ``slurm``: how nodes are asked for. ``salloc`` gets idle ones at once; with ``sbatch`` they begin
        when the scheduler comes to them, for clusters that have batch jobs only.
    microbatches : int
        Number L of microbatches in a step: it fixes the order of the sum, and no more than L ranks can share a step.
    seed : int
        Seed of the order of the samples.
    hold : bool
        True lets the members stand still until newcomers are ready, so that a resize falls on its step exactly. For tests.
    ledger : bool
        True writes down which samples were consumed, in the run directory.
    deadline_s : float
        Seconds until a resize under way is given up.
    arrival : str
        ``spawn`` (newcomers start under the job's own launcher) or ``join`` (each under a launcher of its own; MPICH only).
        ``auto`` is ``join`` with the broker ``slurm``, else ``spawn``.
    stall_s : float
        Seconds without a sign of life after which a rank counts as lost.
    recovery : str
        How a job with distributed arrays, or with ``job.loop``, goes on after a loss: from copies in ``memory`` or the last
        ``checkpoint``, in the same processes; or by a ``restart``.
    copy_s : float
        Seconds between copies in memory, besides one after each resize.
    restarts : int
        Restarts from the last checkpoint at most, under ``hpc-elastic run``.
    checkpoint_steps : int
        Checkpoints so often that a restart does no more than so many steps again; 0 for none.
    checkpoint_s : float
        The same in seconds; 0 for none.
    checkpoints_kept : int
        How many of the last checkpoints are kept.
    checkpoint_dir : str
        Folder for the checkpoints; empty keeps them in the run directory.
    time_limit_s : float
        Seconds after which the job writes a checkpoint and ends; 0 for no limit.
    warm : {"auto", "on", "off"}
        Whether each node has a warm parent, which has imported what the job imports, and forks newcomers in milliseconds.
        ``auto``: if the job imports as much as TensorFlow or PyTorch.
    run_dir : str
        Run directory; empty makes one below ``runs/``.
    progress : str
        ``auto`` (a bar on a terminal, else plain lines), ``plain`` or ``off``.
    """

    min_ranks: int = 1
    max_ranks: int = 0
    ranks: int = 1
    policy: Literal["auto", "manual", "fixed", "timetable", "considerate", "greedy"] = "auto"
    timetable: str = ""
    broker: Literal["local", "script", "slurm"] = "local"
    supply: str = ""
    slots: int = 0
    cores_per_rank: int = 1
    gpus_per_rank: int = 0
    ranks_per_node: int = 1
    patience_s: float = 10.0
    node_hours: float = 0.0
    slurm_options: str = ""
    companions: Literal["salloc", "sbatch"] = "salloc"
    microbatches: int = 16
    seed: int = 0
    hold: bool = False
    ledger: bool = False
    deadline_s: float = 600.0
    arrival: Literal["auto", "spawn", "join"] = "auto"
    stall_s: float = 30.0
    recovery: Literal["memory", "checkpoint", "restart"] = "memory"
    copy_s: float = 10.0
    restarts: int = 5
    checkpoint_steps: int = 0
    checkpoint_s: float = 600.0
    checkpoints_kept: int = 3
    checkpoint_dir: str = ""
    time_limit_s: float = 0.0
    warm: Literal["auto", "on", "off"] = "auto"
    run_dir: str = ""
    progress: Literal["auto", "plain", "off"] = "auto"

    @property
    def joins(self) -> bool:
        """True if each newcomer has a launcher of its own."""
        return self.arrival == "join" or (self.arrival == "auto" and self.broker == "slurm")

    @property
    def decides(self) -> str:
        """The policy, which may depend on the broker."""
        if self.policy != "auto":
            return self.policy
        return "considerate" if self.broker == "slurm" else "manual"

    def check(self) -> None:  # noqa: C901, PLR0912  (a list of contradictions)
        """Raise `ConfigError` where settings contradict each other."""
        for name in ("min", "ranks", "microbatches", "cores_per_rank", "checkpoints_kept", "ranks_per_node"):
            value = getattr(self, "min_ranks" if name == "min" else name)
            if value < 1:
                raise ConfigError(f"{name} = {value}: must be at least 1")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed = {self.seed}: must be below 2**63")
        for name in (
            *("max", "slots", "gpus_per_rank", "seed"),
            *("restarts", "checkpoint_steps", "checkpoint_s", "time_limit_s", "node_hours"),
        ):
            value = getattr(self, "max_ranks" if name == "max" else name)
            if not value >= 0:  # NaN is not, either
                raise ConfigError(f"{name} = {value}: must not be negative")
        for name in ("deadline_s", "stall_s", "copy_s", "patience_s"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name} = {value}: must be positive")
        if self.max_ranks and self.min_ranks > self.max_ranks:
            raise ConfigError(f"min = {self.min_ranks} is more than max = {self.max_ranks}: lower min or raise max")
        if self.max_ranks and self.ranks > self.max_ranks:
            raise ConfigError(f"ranks = {self.ranks} is more than max = {self.max_ranks}: lower ranks or raise max")
        if self.ranks < self.min_ranks and self.ranks != 1:
            raise ConfigError(f"ranks = {self.ranks} is less than min = {self.min_ranks}: raise ranks or lower min")
        if self.policy == "timetable" and not self.timetable:
            raise ConfigError('policy = "timetable" needs a timetable, such as timetable = "20:3,40:2"')
        if self.timetable and self.policy != "timetable":
            raise ConfigError(f'a timetable is given, but policy = "{self.policy}": set policy = "timetable"')
        if self.supply and self.broker != "script":
            raise ConfigError(f'a supply is given, but broker = "{self.broker}": set broker = "script"')
        if self.broker == "slurm" and self.arrival == "spawn":
            raise ConfigError('arrival = "spawn" reaches no other node, but broker = "slurm" gets some: leave arrival out')
        if self.broker == "script" and not self.supply:
            raise ConfigError('broker = "script" needs a supply, such as supply = "0:1,20:3"')


def names() -> list[str]:
    """Names of all settings, as TOML files write them."""
    return [field.encode_name for field in msgspec.structs.fields(Config)]


def from_file(path: Path) -> dict[str, Any]:
    """Return the settings in the TOML file `path`."""
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not valid TOML: {error}") from error
    _known(settings, str(path))
    return settings


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings in `environ`, those of the file that ``HPC_ELASTIC_CONFIG`` names below its own."""
    settings = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environ.items()
        if key.startswith(PREFIX) and key not in NOT_SETTINGS
    }
    _known(settings, "the environment (HPC_ELASTIC_…)")
    below = from_file(Path(environ[FILE_VARIABLE])) if environ.get(FILE_VARIABLE) else {}
    return {**below, **settings}


def _known(settings: Mapping[str, Any], where: str) -> None:
    for key in settings:
        if key not in names():
            near = [SHORT[key]] if key in SHORT else difflib.get_close_matches(key, names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(names())}"
            raise ConfigError(f"unknown setting {key!r} in {where}{hint}")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of all `layers`, later ones winning; None stands for not given."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _known(layer, "the settings")
        merged.update({key: value for key, value in layer.items() if value is not None})
    return merged


def build(*layers: Mapping[str, Any]) -> Config:
    """Return the checked configuration from `layers` of settings, later ones winning.

    Raises
    ------
    ConfigError
        If a setting is unknown, of the wrong type, or contradicts another.
    """
    merged = merge(*layers)
    try:
        config = msgspec.convert(merged, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_wrong(merged, str(error))) from error
    config.check()
    return config


def _wrong(merged: Mapping[str, Any], text: str) -> str:
    """Return what is wrong with a setting, from msgspec's `text` about it."""
    what, _, path = text.partition(" - at `$.")
    name = path.rstrip("`").partition("[")[0]
    (kind,) = [field.type for field in msgspec.inspect.type_info(Config).fields if field.encode_name == name]  # type: ignore[attr-defined]
    choices = [str(value) for value in getattr(kind, "values", ())]
    wanted = f"there are {', '.join(choices)}" if choices else what[:1].lower() + what[1:]
    return f"setting {name} = {merged.get(name)!r}: {wanted}"


def settings(config: Config) -> dict[str, Any]:
    """Return those settings of `config` that differ from the defaults."""
    default = msgspec.to_builtins(Config())
    return {key: value for key, value in msgspec.to_builtins(config).items() if value != default[key]}
