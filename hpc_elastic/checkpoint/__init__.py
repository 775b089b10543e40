"""Checkpoints: what a restart begins with, on any number of ranks.

    FOLDER/00-000001200/       loop 0, step 1200
        manifest.json          what it is, and each file's size and checksums
        part-0.h5, ...         the registered state (in part 0, the leader's), and rows of the distributed arrays

A checkpoint appears whole: it is written as ``.00-000001200.unfinished``, put on the disk, and then renamed. Any HDF5 tool
can read its parts. Here they are read by what the manifest says, past HDF5, so that damage is told and does no harm.
"""

from __future__ import annotations

from .manifest import About, Form
from .parts import Rows
from .saved import Checkpoint
from .store import Store
from .writer import Buffers, Outcome, Writer

__all__ = ["About", "Buffers", "Checkpoint", "Form", "Outcome", "Rows", "Store", "Writer"]
