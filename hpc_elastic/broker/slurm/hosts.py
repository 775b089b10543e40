"""Host lists such as ``n[1-3,7]``: ClusterShell reads and writes them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

PLAIN = re.compile(r"[\w.-]+")


def names(text: str) -> tuple[str, ...]:
    """Return the hosts of a host list, sorted as numbers; `ConfigError` if it can't be read.

    Groups (``@gpu``) are not looked up, since Slurm has none.
    """
    if not text:
        return ()
    if PLAIN.fullmatch(text):
        return (text,)  # most are, and ClusterShell takes 20 us for each
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        return tuple(NodeSet(text, resolver=RESOLVER_NOGROUP))
    except NodeSetException as error:
        raise ConfigError(f"{text!r} is not a host list, as in n[1-3,7]: {error}") from error


def folded(hosts: Iterable[str]) -> str:
    """Return the host list of `hosts`."""
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    return str(NodeSet.fromlist(list(hosts), resolver=RESOLVER_NOGROUP))
