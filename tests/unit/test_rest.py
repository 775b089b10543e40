"""The leader rests only where nothing can have come up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hpc_elastic.model import Cursor
from hpc_elastic.runtime.rest import NO_REST, Rest

WORLD, OFFICE = object(), object()


def here(step=5, loop=1):
    return SimpleNamespace(cursor=Cursor(0, 0, step), loop=loop)


@pytest.mark.parametrize(
    ("now_s", "place", "world", "office", "lasts"),
    [
        (9.9, here(), WORLD, OFFICE, True),
        (10.0, here(), WORLD, OFFICE, False),
        (9.9, here(7), WORLD, OFFICE, False),
        (9.9, here(6), WORLD, OFFICE, True),
        (9.9, here(loop=2), WORLD, OFFICE, False),
        (9.9, here(), object(), OFFICE, False),
        (9.9, here(), WORLD, object(), False),
    ],
)
def test_what_ends_a_rest(now_s, place, world, office, lasts):
    assert Rest(10.0, 7, 1, WORLD, OFFICE).lasts(now_s, place, world, office) == lasts


def test_there_is_none_at_first():
    assert not NO_REST.lasts(0.0, here(0, 0), WORLD, OFFICE)
