"""What is tested with ``--all-faults`` alone: the default run has to be short."""

from __future__ import annotations

import pytest


def also(*values, **other):
    """Return a further case of a test, for ``--all-faults``."""
    return pytest.param(*values, marks=pytest.mark.all_faults, **other)
