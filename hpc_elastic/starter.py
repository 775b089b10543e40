"""Starter of a companion: gets its node from Slurm at once, has its agent run there, and is gone.

    python -I -S starter.py RUN N LIMIT_S AGENT... -- OPTIONS...

Run by path, in a session of its own, it imports nothing of the package. ``salloc`` is granted idle nodes within
milliseconds, where a batch job waits for the scheduler's next round. But nothing ends what was granted, until a first step
runs there: so one program does both, whatever becomes of the rank that asked. In the run directory, below ``companions``, it

- writes ``N.job``, Slurm's number of the allocation, as soon as that is known;
- withdraws the request when ``N.release`` is there, after ``LIMIT_S`` seconds, or on SIGTERM;
- starts the agent as a step, and ends the allocation if that fails;
- once the agent has said that it is there (``N.held.json``), leaves ``srun`` to itself; ``N.step`` says where that is.

It ends with 0 if the agent runs, and else with what Slurm's commands said on stderr. The step ends if its ``srun`` is told
to, as at the end of the job that runs here. If this host is a companion, its agent ends ``srun`` before that in a way that
the step does not notice. (So it could be done at once; but without its ``srun`` Slurm takes 2 s more to end a step.)
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise

POLL_S, AGENT_S, END_S = 0.005, 30.0, 5.0
TRIES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)  # between tries to end an allocation: slurmctld may be away
STEP = ("--nodes=1", "--ntasks=1", "--cpu-bind=none", "--mpi=none", "--input=none", "--output=none", "--error=none")


class Starter:
    """The starter of one companion."""

    def __init__(self, run: str, number: str, limit_s: float, agent: list[str]) -> None:
        self.folder, self.number, self.agent = os.path.join(run, "companions"), number, agent
        self.until = time.monotonic() + limit_s
        self.told = False  # to end
        self.job = self.words = ""

    def file(self, kind: str) -> str:
        """Return the path of one of the companion's files."""
        return os.path.join(self.folder, f"{self.number}.{kind}")

    def unwanted(self) -> bool:
        """Tell whether nobody wants the companion any more."""
        return self.told or time.monotonic() > self.until or os.path.exists(self.file("release"))

    def get(self, options: list[str]) -> bool:
        """Ask for the node, and tell whether it was granted."""
        salloc = subprocess.Popen(
            ["salloc", "--no-shell", *options], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert salloc.stderr is not None
        stderr = salloc.stderr.fileno()
        kill_at = float("inf")
        while True:
            if select.select([stderr], [], [], POLL_S)[0]:
                data = os.read(stderr, 1 << 16)
                self.words += data.decode(errors="replace")
                self.note()
                if not data:
                    break
            now = time.monotonic()
            if kill_at == float("inf") and self.unwanted():
                kill_at = now + END_S
                salloc.terminate()
            if now > kill_at:
                salloc.kill()
        code = salloc.wait()
        if code == 0 and self.job and not self.unwanted():
            return True
        if self.job:
            self.end()
        return False

    def note(self) -> None:
        """Write down Slurm's number of the allocation: ``salloc: Pending job allocation 7``."""
        words = self.words.split()
        numbers = [word for before, word in pairwise(words) if before == "allocation" and word.isdigit()]
        if numbers and not self.job:
            self.job = numbers[0]
            self.put("job", self.job)

    def put(self, kind: str, text: str) -> None:
        """Write a file so that it is there whole, or not at all."""
        beside = os.path.join(self.folder, f".{self.number}.{kind}.{os.getpid()}")
        with open(beside, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
        os.rename(beside, self.file(kind))

    def say_why(self) -> None:
        """Say why the agent does not run: to who asked, who knows more, or to all if that one is gone."""
        try:
            os.write(2, f"{self.words}\n".encode())
        except OSError:
            if not os.path.exists(self.file("end")):
                self.put("end", "it was withdrawn")

    def begin(self) -> bool:
        """Start the agent, and tell whether it runs."""
        with open(self.file("srun"), "w+b", opener=lambda path, flags: os.open(path, flags, 0o600)) as stderr:
            null = subprocess.DEVNULL
            step = subprocess.Popen(
                ["srun", f"--jobid={self.job}", *STEP, *self.agent], stdin=null, stdout=null, stderr=stderr
            )
            deadline = time.monotonic() + AGENT_S
            while not os.path.exists(self.file("held.json")):
                if step.poll() is not None or self.told or time.monotonic() > deadline:
                    self.end()
                    try:
                        step.wait(END_S)
                    except subprocess.TimeoutExpired:
                        step.kill()
                    stderr.seek(0)
                    self.words = stderr.read().decode(errors="replace")
                    return False
                time.sleep(POLL_S)
        self.put("step", f"{step.pid} {os.uname().nodename}")
        return True

    def end(self) -> None:
        """End the allocation."""
        for pause_s in TRIES_S:
            done = subprocess.run(["scancel", self.job], check=False, capture_output=True)
            if done.returncode == 0 or b"nvalid job id" in done.stderr:
                return
            time.sleep(pause_s)


def main() -> int:
    """Be the starter of one companion."""
    run, number, limit_s, *rest = sys.argv[1:]
    cut = rest.index("--")
    starter = Starter(run, number, float(limit_s), rest[:cut])

    def told(*_: object) -> None:
        starter.told = True

    signal.signal(signal.SIGTERM, told)
    try:
        good = starter.get(rest[cut + 1 :]) and starter.begin()
    except OSError as problem:
        starter.words += f"{problem.filename or 'companion'}: {problem.strerror}\n"
        good = False
    if not good:
        starter.say_why()
    return 0 if good else 1


if __name__ == "__main__":
    # At once: a SIGTERM while the interpreter ends would make it look as if the agent did not run.
    os._exit(main())
