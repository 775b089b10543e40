"""The scripted schedule of one run, and what is measured in it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..work import ROW
from .systems import System

STEADY = 40  # steps that as many workers as wanted have done together
WAIT_S, END_S = 90.0, 240.0
LOOK_S = 0.05
AT_RANDOM_S = 0.5  # before a change: commits and snapshots come every so many steps as well


class StoppedError(Exception):
    """The job does not go on."""


class Run:
    """A run of a system, watched by the stamps of its workers."""

    def __init__(self, system: System, folder: Path) -> None:
        self._system, self._folder, self._draw = system, folder, random.Random(str(folder))

    def rows(self) -> dict[int, np.ndarray]:
        """Return the steps that each worker has finished, by their pids."""
        found = {}
        for file in (self._folder / "stamps").iterdir():
            data = file.read_bytes()
            found[int(file.name.partition("-")[0])] = np.frombuffer(data[: len(data) // ROW.itemsize * ROW.itemsize], ROW)
        return found

    def merged(self) -> np.ndarray:
        """Return all of them, by time."""
        return np.sort(np.concatenate([np.empty(0, ROW), *self.rows().values()]), order="time")

    def steady(self, workers: int | None, since: float) -> bool:
        """Tell whether `workers` workers, or any number, have done enough steps without a change after the time `since`."""
        late = self.merged()
        late = late[late["time"] > since]
        size = late["size"][-1:]
        if not len(late) or (workers is not None and size[0] != workers):
            return False
        return len(np.unique(late["step"][late["size"] == size[0]])) >= STEADY and bool(
            (late["size"][-STEADY:] == size[0]).all()
        )

    def until(self, done: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
        """Wait; raise `StoppedError` if the job ends before, or the limit is passed."""
        deadline = time.monotonic() + limit_s
        while not done():
            if (code := self._system.process.poll()) is not None:
                raise StoppedError(f"{what}: the job ended with exit code {code}")
            if time.monotonic() > deadline:
                raise StoppedError(f"{what}: not within {limit_s:.0f} s")
            time.sleep(LOOK_S)

    def end(self) -> None:
        """Wait for the end; raise `StoppedError` if it is none."""
        try:
            code = self._system.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise StoppedError(f"end: not within {END_S:.0f} s") from None
        if code:
            raise StoppedError(f"end: the job ended with exit code {code}")

    def change(self, act: Callable[[], object], workers: int | None, what: str) -> dict[str, Any]:
        """Do something to the job, wait until it is steady, and return how long it stood still."""
        time.sleep(self._draw.uniform(0, AT_RANDOM_S))
        begun = time.time()
        act()
        self.until(lambda: self.steady(workers, begun), what)
        rows = self.merged()
        before = np.unique(rows["time"][rows["time"] < begun])
        usual_s = float(np.median(np.diff(self._of_one(rows[rows["time"] < begun])[-STEADY:])))
        times = np.concatenate([before[-1:], rows["time"][rows["time"] >= begun]])
        after = rows[(rows["time"] > begun) & (rows["size"] == (workers or rows["size"][-1]))]
        new = {"standstill_s": float(np.diff(times).max()) - usual_s, "until_s": float(after["time"][0]) - begun}
        stood_s, until_s = new["standstill_s"], new["until_s"]
        print(f"  {what}: stood still for {stood_s:.3f} s, as wanted after {until_s:.2f} s", file=sys.stderr, flush=True)
        return {**new, "workers": int(rows["size"][-1])}

    @staticmethod
    def _of_one(rows: np.ndarray) -> np.ndarray:
        """Return the times of the last worker's steps."""
        return rows["time"][rows["member"] == rows["member"][-1]]

    def kill_the_newest(self) -> None:
        """Kill the worker that was there last to come."""
        os.kill(max(self.rows().items(), key=lambda item: item[1]["time"][0] if len(item[1]) else 0.0)[0], signal.SIGKILL)


def go(system: type[System], folder: Path, epochs: int, pause_s: float) -> dict[str, Any]:
    """Return what one run of `system` came to: standstills by change, samples by what became of them, and the accuracy."""
    for name in ("stamps", "ledger"):
        (folder / name).mkdir(parents=True)
    found: dict[str, Any] = {"added": [], "removed": [], "killed": [], "troubles": []}
    with system(folder, [str(epochs), str(pause_s)]) as running:
        run = Run(running, folder)
        try:
            run.until(lambda: run.steady(1, 0.0), "start")
            found["added"].append(run.change(running.add, 2, "added"))
            found["removed"].append(run.change(running.remove, 1, "removed"))
            found["added"].append(run.change(running.add, 2, "added again"))
            found["killed"].append(run.change(run.kill_the_newest, None, "killed"))
            run.end()
        except StoppedError as error:
            found["troubles"].append(str(error))
            print(f"  {error}", file=sys.stderr, flush=True)
    result = folder / "result.json"
    if result.exists():
        found["accuracy"] = json.loads(result.read_text())["accuracy"]
        found |= counted([*(folder / "ledger").glob("*"), *(folder / "run" / "ledger").glob("*")], folder.parent, epochs)
    return found


def counted(ledgers: list[Path], folder: Path, epochs: int) -> dict[str, int]:
    """Return how many samples were repeated, lost, and computed in vain, over all epochs."""
    rows = np.concatenate([np.fromfile(file, np.int64).reshape(-1, 4) for file in ledgers])
    steps = rows[:, 1]
    last = np.zeros(steps.max() + 1, np.int64)
    np.maximum.at(last, steps, rows[:, 2])
    count = rows[rows[:, 2] == last[steps]]
    samples = len(np.load(folder / "data" / "train-label.npy", mmap_mode="r"))
    times = np.zeros((epochs, samples), np.int64)
    np.add.at(times, (count[:, 0], count[:, 3]), 1)
    return {
        "repeated": int(np.maximum(times - 1, 0).sum()),
        "lost": int((times == 0).sum()),
        "in_vain": len(rows) - len(count),
    }
