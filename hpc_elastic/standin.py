"""Stand-in: what a seed rank started without a launcher becomes when it leaves. Waits for the end, ends as the run ended.

    python -I -S standin.py RUN
"""

from __future__ import annotations

import glob
import json
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read(*path: str) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None."""
    try:
        with open(os.path.join(*path)) as file:
            found: dict[str, Any] = json.load(file)
            return found
    except OSError:
        return None


def alive(pid: int) -> bool:
    """Tell whether a process runs."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    """Wait, and end."""
    run = sys.argv[1]
    state = "running"
    while state not in ("ended", "stopped", "failed"):
        time.sleep(0.05)
        status = read(run, "status.json")
        if status is None or os.path.exists(os.path.join(run, "failure.json")):
            state = "failed"
        else:
            state = status["state"]
    records = [read(path) for path in glob.glob(os.path.join(glob.escape(run), "ranks", "[0-9]*.json"))]
    members = [record["member"] for record in records if record is not None]
    here = [m["pid"] for m in members if m["host"] == os.uname().nodename and m["pid"] != os.getpid()]
    while any(alive(pid) for pid in here):  # what follows he.run in the script may still print
        time.sleep(0.02)
    sys.exit(1 if state == "failed" else 0)


main()
