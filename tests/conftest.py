"""Options of the tests."""

from __future__ import annotations

from pathlib import Path

from .launch import side_by_side


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true", help="test a fault at every stage, not only at some: ten minutes")
    parser.addoption("--fault-table", type=Path, metavar="FILE.md", help="write what the faults led to into this file")


def pytest_xdist_auto_num_workers(config):  # noqa: ARG001  (the hook's signature)
    return side_by_side()
