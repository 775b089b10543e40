"""The communicator that users get for their own messages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from mpi4py import MPI

from ..model import Member

Mark = Callable[[Iterable[Member]], AbstractContextManager[object]]


class UserComm(MPI.Intracomm):
    """A communicator whose calls are marked while they last: with a lost rank they may never end, and then this rank must.

    It is used as any `mpi4py.MPI.Intracomm`. Communicators made from it are not marked.
    """

    _mark: Mark | None = None
    _members: tuple[Member, ...] = ()

    @classmethod
    def marked(cls, comm: MPI.Intracomm, mark: Mark, members: tuple[Member, ...]) -> UserComm:
        """Return `comm` with its calls marked by `mark`, which is given the `members` of the communicator."""
        made = cls(comm)
        made._mark, made._members = mark, members
        return made

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        mark = None if name.startswith("_") else super().__getattribute__("_mark")
        if mark is None or not callable(value):
            return value
        members = super().__getattribute__("_members")

        @functools.wraps(value)
        def call(*arguments: Any, **options: Any) -> Any:
            with mark(members):
                return value(*arguments, **options)

        return call
