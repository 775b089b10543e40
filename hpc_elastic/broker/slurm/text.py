"""Slurm's texts: what ``scontrol`` prints, durations, and refusals."""

from __future__ import annotations

import re

from ...errors import SlurmError, SlurmMissing, SlurmRefused, SlurmUnreachable
from .seen import Partition

DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
NOTHING = frozenset({"", "(null)", "n/a", "none", "unlimited", "infinite", "not_set", "partition_limit"})

UNREACHABLE = re.compile(
    r"unable to contact slurm controller|munge|authentication|socket timed out|connection (?:refused|timed out|reset)"
    r"|zero bytes|communication|standby mode|temporarily unable|try again|transport endpoint|not responding"
    r"|connect failure|address lookup|failed while waiting",
    re.IGNORECASE,
)
MISSING = re.compile(
    r"configuration source|unable to process configuration|cannot stat file|could not load|parsing|resolve_ctls",
    re.IGNORECASE,
)
ADVICE = (
    ("partition", "sinfo lists the partitions; set another one"),
    ("account", "sacctmgr show associations user=$USER lists your accounts; set one of them"),
    ("qos", "sacctmgr show associations user=$USER lists the QOS that you may use; set one of them"),
    ("association", "ask for an account on this cluster, or set another account or partition"),
    ("time limit", "ask for less time: scontrol show partition tells the limit"),
    ("memory", "ask for less memory: sinfo -o '%n %m' tells what nodes have"),
    ("generic resource", "sinfo -o '%n %G' tells which GPUs and other resources there are"),
    ("gres", "sinfo -o '%n %G' tells which GPUs and other resources there are"),
    ("feature", "sinfo -o '%n %f' tells the features that nodes have"),
    ("node count", "ask for fewer nodes"),
    ("node configuration", "ask for what the nodes of the partition have: sinfo -Nel lists it"),
    ("limit", "ask for less, or wait until jobs of yours have ended"),
    ("permission", "only the job's owner and operators may do this"),
    ("denied", "only the job's owner and operators may do this"),
)


def refusal(command: str, message: str, code: int) -> SlurmError:
    """Return the error for what a command wrote before it failed."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = "; ".join(dict.fromkeys(lines))[-600:] or f"it ended with code {code} and said nothing"
    if MISSING.search(told):
        return SlurmMissing(f"{command}: {told}. There is no configured Slurm here; SLURM_CONF names its configuration file")
    if UNREACHABLE.search(told):
        return SlurmUnreachable(f"{command}: {told}. slurmctld or munge is down or slow; it is worth another try later")
    lower = told.lower()
    advice = next((what for word, what in ADVICE if word in lower), "change the request; Slurm's message tells why")
    return SlurmRefused(f"{command}: {told}. What to do: {advice}")


def duration_s(text: str) -> float | None:
    """Return a duration in Slurm's writing (``[D-]HH:MM:SS``, ``MM:SS``, ``MM``) in seconds; None for none or no limit."""
    text = text.strip()
    if text.lower() in NOTHING:
        return None
    match = DURATION.fullmatch(text)
    if match is None:
        raise SlurmError(f"{text!r} is no duration that Slurm's manual describes (sbatch, --time)")
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
        hours, minutes, seconds = [*fields, 0, 0][:3]
        return float(int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds)
    hours, minutes, seconds = {1: [0, *fields, 0], 2: [0, *fields]}.get(len(fields), fields)
    return float(hours * 3600 + minutes * 60 + seconds)


def duration(seconds: float) -> str:
    """Return `seconds` as Slurm reads them: whole minutes, at least one, since 0 stands for no limit."""
    return str(max(1, int(seconds // 60)))


def settings(text: str) -> dict[str, str]:
    """Return what ``scontrol show config`` prints, ``Name = value`` on each line."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def fields(line: str) -> dict[str, str]:
    """Return one line of ``scontrol show … -o``, ``Name=value Name=value``; values may hold ``=``."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def allowed(names: str) -> str:
    """Return who may use a partition: ``"all"``, or names."""
    return "all" if names.lower() in {"", "all"} else names


def partition(line: str) -> Partition:
    """Return the partition of one line of ``scontrol show partition -o``."""
    has = fields(line)
    most = has.get("MaxNodes", "UNLIMITED")
    return Partition(
        name=has["PartitionName"],
        up=has.get("State", "UP").upper() == "UP",
        default=has.get("Default") == "YES",
        nodes="" if has.get("Nodes", "").lower() in NOTHING else has["Nodes"],
        node_count=int(has.get("TotalNodes", "0")),
        max_time_s=duration_s(has.get("MaxTime", "")),
        default_time_s=duration_s(has.get("DefaultTime", "")),
        max_nodes=int(most) if most.isdigit() else None,
        min_nodes=int(has.get("MinNodes", "0")),
        preempt_mode=has.get("PreemptMode", "off").lower(),
        priority_tier=int(has.get("PriorityTier", "1")),
        grace_s=float(has.get("GraceTime", "0")),
        oversubscribe=has.get("OverSubscribe", "no").lower(),
        allowed_accounts=allowed(has.get("AllowAccounts", "ALL")),
        allowed_qos=allowed(has.get("AllowQos", "ALL")),
        qos="" if has.get("QoS", "").lower() in NOTHING else has["QoS"],
    )
