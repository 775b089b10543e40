"""What to say where the system lets there be no more processes or threads. Imports nothing: `guard` loads it by its path."""

from __future__ import annotations

AT_LIMIT = "no more processes or threads can be had: raise the limit (ulimit -u, or pids.max of a cgroup), or lower max"


def why_not(problem: OSError) -> str:
    """Return in words why there can't be another process."""
    return AT_LIMIT if isinstance(problem, BlockingIOError) else problem.strerror or str(problem)
