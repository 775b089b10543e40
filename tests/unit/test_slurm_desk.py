"""The desk of the Slurm broker, in a process of its own, since its threads go on for good."""

from __future__ import annotations

import subprocess
import sys

DESK = """
import pathlib, sys, time
from hpc_elastic.broker.slurm.companions import Files
from hpc_elastic.broker.slurm.desk import Desk
from hpc_elastic.broker.slurm.seen import Snapshot

class Slurm:
    def snapshot(self):
        return Snapshot((), ())
    def cancel(self, numbers):
        list(numbers)

def needs():
    asked.append("needs")
    if asked.count("needs") == 1:
        raise OSError(28, "No space left on device")
    return "needs"

def until(done):
    limit = time.monotonic() + 20
    while not done():
        assert time.monotonic() < limit, (asked, desk.state)
        time.sleep(0.01)

asked = []
desk = Desk(Slurm(), Files(pathlib.Path(sys.argv[1])), needs, None)
"""


def desk(folder, text):
    done = subprocess.run(
        [sys.executable, "-c", DESK + text, folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_queue_is_read_when_the_run_directory_can_be_written_again(tmp_path):
    desk(tmp_path, "until(lambda: desk.state.snapshot and not desk.state.trouble)")
