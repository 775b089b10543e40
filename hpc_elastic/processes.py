"""What proc(5) says of a process of this host."""

from __future__ import annotations

import os

TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
STATE, PARENT, BEGAN, ENVIRON_END = 0, 1, 19, 48  # fields behind the name


def fields(pid: int) -> list[str]:
    """Return what ``/proc/PID/stat`` has behind the process's name; nothing if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  (called often)
            return file.read().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _state(pid: int) -> str:
    return (fields(pid) or ["X"])[STATE]


def alive(pid: int) -> bool:
    """Tell whether process `pid` runs (a zombie does not)."""
    return _state(pid) not in "ZX"


def is_stopped(pid: int) -> bool:
    """Tell whether process `pid` is stopped."""
    return _state(pid) == "T"


def is_zombie(pid: int) -> bool:
    """Tell whether process `pid` has ended, and its parent has not taken note of it yet."""
    return _state(pid) == "Z"


def age_s(pid: int) -> float:
    """Return for how many seconds process `pid` has been there, 0 if it is not."""
    found = fields(pid)
    with open("/proc/uptime", encoding="ascii") as file:  # noqa: PTH123
        up_s = float(file.read().split()[0])
    return up_s - int(found[BEGAN]) * TICKS_S if found else 0.0
