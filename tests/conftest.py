"""Options of the tests."""

from __future__ import annotations

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true", help="test a fault at every stage, not only at some: ten minutes")
    parser.addoption("--fault-table", type=Path, metavar="FILE.md", help="write what the faults led to into this file")
