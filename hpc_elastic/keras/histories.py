"""The histories of fits that were done, a file each: for ranks that come in a later one, and pass over these."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .state import Callbacks

if TYPE_CHECKING:
    from ..runtime.job import Job


class Fit(msgspec.Struct, frozen=True):
    """What a `fit` has returned, as text of Python's: a loss may be no number, which strict JSON can't say."""

    history: str


def write(job: Job, history: Any) -> None:
    """Leave `history` for newcomers of further loops, and for restarts there. Where it can't be, the leader says so."""
    run = job.session.run
    try:
        run.put(run.history(job.here.loop), Fit(json.dumps(Callbacks([history]).state(), default=_taken_apart)))
    except OSError as problem:
        leader = job.membership.leader
        if leader is not None:
            leader.reports.say(f"newcomers of a later fit won't have the history of this one: {problem}")


def read(job: Job, history: Any) -> None:
    """Have `history` be that of the `fit` that was done, if it was left."""
    run = job.session.run
    fit = run.get(run.history(job.here.loop), Fit)
    if fit is not None:
        Callbacks([history]).load(json.loads(fit.history, object_hook=_put_together))


def _taken_apart(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": array.shape, "bytes": array.tobytes().hex()}


def _put_together(found: dict[str, Any]) -> Any:
    if found.keys() != {"dtype", "shape", "bytes"}:
        return found
    return np.frombuffer(bytes.fromhex(found["bytes"]), np.dtype(found["dtype"])).reshape(found["shape"]).copy()
