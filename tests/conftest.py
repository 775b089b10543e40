"""Options of the tests."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from hpc_elastic.comm.vendor import orphaned_shared_memory

from .launch import side_by_side

# Tests run side by side with others that start ranks: how long an example takes says nothing. The examples are the same each
# time, so that a test that passed goes on passing; `make search` looks for new ones.
settings.register_profile("repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile("repeatable")
LONG = (
    "tests/unit/test_docs.py::test_examples_run",
    "tests/elastic/test_cycles.py",
    "tests/elastic/test_keras.py",
    "tests/elastic/test_fit.py",
)
SEGMENTS = pytest.StashKey[set[Path]]()


def pytest_addoption(parser):
    parser.addoption("--all-faults", action="store_true", help="all faults, kills and random schedules, not only some")
    parser.addoption("--fault-table", type=Path, metavar="FILE.md", help="write what the faults led to into this file")


def pytest_xdist_auto_num_workers(config):  # noqa: ARG001  (the hook's signature)
    return side_by_side()


def pytest_collection_modifyitems(config, items):
    """Begin with the long ones: at the end, one would run alone. Leave out what needs TensorFlow where there is none."""
    left_out = {}
    if importlib.util.find_spec("tensorflow") is None:
        left_out["tensorflow"] = "needs TensorFlow, which make setup installs with MPICH only"
    if not config.getoption("all_faults"):
        left_out["all_faults"] = "takes long: `pytest --all-faults` runs it"
    for item in items:
        for name, reason in left_out.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it; tests send it
    config.stash[SEGMENTS] = set(orphaned_shared_memory())


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session):
    """After the last worker's end, look for what tests have left of MPI beside the jobs that `Job` looks after."""
    yield
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", None):
        return
    left = set(orphaned_shared_memory()) - session.config.stash[SEGMENTS]
    if left:
        session.config.get_terminal_writer().line(f"\nleft in shared memory: {', '.join(sorted(map(str, left)))}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    file = config.getoption("fault_table")
    if file is not None:
        from .elastic import fault_table
        from .elastic.test_faults import CELLS

        reports = [report for kind in terminalreporter.stats.values() for report in kind]
        order = [(cell.job, cell.stage, cell.role) for cell in CELLS]
        fault_table.write(file, fault_table.gathered(reports), order)
