"""Which way GPU arrays are added up over ranks: decided alike on all of them, from what each has found. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec


class Found(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has found.

    Attributes
    ----------
    host : str
        Where it is.
    gpu : str
        What its GPU is called there; empty if it has none.
    nccl : int
        NCCL's version; 0 if it is not there.
    """

    host: str
    gpu: str = ""
    nccl: int = 0


class Choice(NamedTuple):
    """The way, and why: from GPU to GPU by NCCL, or staged through the memory of the hosts."""

    nccl: bool
    reason: str


def choose(found: Sequence[Found]) -> Choice:
    """Return the way for ranks, in their order, that have found this."""
    without = [rank for rank, one in enumerate(found) if not one.gpu]
    if without:
        return Choice(nccl=False, reason=f"rank {without[0]} has no GPU")
    lacking = [rank for rank, one in enumerate(found) if not one.nccl]
    if lacking:
        return Choice(nccl=False, reason=f"rank {lacking[0]} has no NCCL of version 2.9 or newer")
    if len({one.nccl for one in found}) > 1:
        rank = next(rank for rank, one in enumerate(found) if one.nccl != found[0].nccl)
        return Choice(nccl=False, reason=f"ranks 0 and {rank} have different versions of NCCL")
    (host, gpu), ranks = Counter((one.host, one.gpu) for one in found).most_common(1)[0]
    if ranks > 1:
        return Choice(nccl=False, reason=f"{ranks} ranks share GPU {gpu} of {host}, which NCCL refuses")
    return Choice(nccl=True, reason=f"each of {len(found)} ranks has a GPU of its own, and NCCL")
