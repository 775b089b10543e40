"""Stands in for the runtime in tests of the supervisor: a rank that says of itself what a real one would, and misbehaves.

Scripts under test import it instead of calling he.run, so that what they do depends on nothing but the run directory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from hpc_elastic.config import RUN_VARIABLE
from hpc_elastic.events import EventLog, Started
from hpc_elastic.model import Member
from hpc_elastic.rundir import Answer, Failure, RankRecord, RunDirectory, Status

LIMIT_S = 30.0
ME = Member(id=0, pid=os.getpid(), host=socket.gethostname())


class Rank:
    """The only rank of a job."""

    def __init__(self, **settings):
        self.run = RunDirectory(Path(os.environ[RUN_VARIABLE]))
        self.attempt = self.run.attempt()
        self.log = EventLog(self.run.events)
        settings = {**json.loads((self.run.path / "config.json").read_bytes()), **settings}
        self.log.write(Started(script="standin", mpi="none", hosts=(ME.host,), ranks=1, settings=settings))
        self.record("member")
        self.beat()

    def record(self, outcome):
        self.run.put_record(RankRecord(member=ME, outcome=outcome, time=time.time()))

    def beat(self):
        self.run.beat_file(ME.id).touch()

    def step(self, number, state="running"):
        self.run.put_status(
            Status(state=state, time=time.time(), started=0.0, ranks=1, members=(ME,), step=number, steps=100, unit="turns")
        )

    def fail(self, kind, step=-1, error="it broke", code=1):
        self.run.fail(
            Failure(
                error=error,
                traceback="",
                member=0,
                rank=0,
                host=ME.host,
                generation=0,
                step=step,
                told=kind == "error",
                kind=kind,
            )
        )
        self.leave(code)

    def leave(self, code):
        """End at once, without a word."""
        sys.stdout.flush()
        os._exit(code)

    def end(self, state="ended"):
        self.record("ended")
        self.step(100 if state == "ended" else 57, state)

    def until_asked(self, *, heed=True):
        """Step on until somebody asks for a stop; then stop, or `heed` it not."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            self.beat()
            for name, request in self.run.requests():
                if heed and request.kind == "stop":
                    self.run.answer(name, Answer(accepted=True, text="stops"))
                    self.end("stopped")
                    return
            time.sleep(0.01)

    def freeze(self):
        """Be stopped, as by a debugger, or a machine that swaps."""
        os.kill(os.getpid(), signal.SIGSTOP)
