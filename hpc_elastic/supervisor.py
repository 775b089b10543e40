"""The supervisor: starts a job under its launcher, starts it again where it was lost, and ends as the job ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import events, launching
from .attempt import Attempt, lose
from .broker.slurm import leases
from .broker.slurm.getting import own_agent
from .checkpoint import Checkpoint, Store
from .comm.vendor import prepare
from .config import RUN_VARIABLE, SUPERVISED_VARIABLE, build
from .errors import CheckpointError, LaunchError, RunDirectoryError
from .interrupts import Interrupts
from .leftovers import HOST
from .model import Request
from .outputs import Outputs
from .places import checkpoint_folder
from .progress import Progress
from .restarts import Setback, account, wait_s, why_not
from .rundir import End, Failure, RunDirectory, Status

GUARD = Path(__file__).parent / "guard.py"
LOOK_S = 0.1
AGENT_S = 10.0  # how long the agent of this host has to end its guards, for which it takes some seconds at most
PROCESSES, LINES = 4, 12  # whose last words are shown, and how many of them
WELL = ("ended", "stopped")

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NEVER_RAN, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class Supervisor:
    """One run of a script, made by `start` or by `resume`.

    Parameters
    ----------
    prepared : Prepared
        The run directory, its lock, and how the job is started.
    new : bool
        True if nothing has run in it yet.
    """

    def __init__(self, prepared: launching.Prepared, *, new: bool) -> None:
        self.run, self.launch, self._lock, self.mpiexec, self.vendor = prepared
        self._outputs = Outputs(self.run.path / "companions", sys.stdout.buffer)
        self.config = build(self.launch.settings)
        self._new = self._kept = new  # whether launch.json has the settings: once the job has come to run with them
        self._began = time.time()
        self._progress = Progress(Progress.mode(self.config.progress))
        self._interrupts = Interrupts()
        self._asked = self._settled = self._reached = False
        self._starts = len(_starts(self.run))
        self._setbacks: list[Setback] = []
        self._agent: subprocess.Popen[bytes] | None = None  # in a Slurm job

    @classmethod
    def start(cls, script: str, arguments: list[str], given: dict[str, Any], *, module: bool = False) -> Supervisor:
        """Make the supervisor of a new run.

        Parameters
        ----------
        script : str
            Script file, or with `module` the name of a module.
        arguments : list of str
            Its arguments.
        given : dict
            The job's settings as given outside the script, which win over the script's own.
        module : bool
            True if `script` names a module.
        """
        return cls(launching.new(script, arguments, given, module=module), new=True)

    @classmethod
    def resume(cls, run: RunDirectory, given: dict[str, Any]) -> Supervisor:
        """Make the supervisor of a run that failed, was stopped or was killed.

        Parameters
        ----------
        run : RunDirectory
            The run. What is left of it on this host is ended and put away.
        given : dict
            Settings that win over those it was started with.

        Raises
        ------
        RunDirectoryError
            If it ended well, has a supervisor, or was not started by one.
        """
        return cls(launching.again(run, given), new=False)

    def command(self) -> list[str]:
        """Return the command that starts the seed rank."""
        # The guard's own interpreter needs neither site-packages nor the environment's Python settings.
        guard = [sys.executable, "-I", "-S", str(GUARD), str(self.run.path), "0"]
        target = ["-m", self.launch.script] if self.launch.module else [self.launch.script]
        command = [str(self.mpiexec), *self.vendor.launch, "-n", "1", *guard]
        return [*command, sys.executable, *target, *self.launch.arguments]

    def origin(self) -> str:
        """Return in words where the next attempt will begin."""
        folder = Path(self.launch.directory) / checkpoint_folder(self.config, self.run.path)
        with contextlib.suppress(CheckpointError):
            for path in reversed(Store(folder).all()):
                with contextlib.suppress(CheckpointError):
                    about = Checkpoint.open(path).about  # the ranks check all of it, and say so if they take another one
                    loop = f" of loop {about.loop}" if about.loop > 1 else ""
                    return f"from the checkpoint of step {about.cursor.step}{loop}"
        return "from the beginning, since there is no checkpoint"

    def go(self) -> int:
        """Run the job to its end and return the exit code."""
        try:
            with self._interrupts:
                while (code := self._attempt()) is None:
                    pass
                return code
        finally:
            self._progress.close()
            leases.end(self.run.path)
            self._lock.close()

    def _attempt(self) -> int | None:
        """Start the job and watch it to its end. Return the exit code, or None if it is to be started again."""
        environ = dict(os.environ)
        prepare(environ)
        environ[RUN_VARIABLE] = str(self.run.path)
        environ[SUPERVISED_VARIABLE] = str(self._began)  # a time limit counts from here, over all restarts
        try:
            outlived = self.config.joins
            attempt = Attempt(
                self.run,
                self.command(),
                environ,
                self.launch.directory,
                outlived=outlived,
                proxy=self.vendor.proxy,
            )
        except OSError as error:
            raise LaunchError(f"{self.mpiexec} can't be started: {error.strerror}") from error
        well = False
        try:
            self._watch(attempt, environ)
            well = self._ended_well()
        finally:
            self._end_agent()
            if well:
                self._outputs.finish()
            self._outputs.pass_on(all_of_it=True)
            left = attempt.clean(thoroughly=not well or attempt.lingers)
            if not well:
                self._clean_checkpoints()
        if left:
            self._say(f"processes {left} can't be ended")
        return self._verdict(attempt)

    # --- while it runs ------------------------------------------------------------------------------------------------

    def _watch(self, attempt: Attempt, environ: dict[str, str]) -> None:
        over = False
        while not over and not self._heed():
            if self._settled and self._agent is None and self.config.broker == "slurm":
                null = subprocess.DEVNULL
                self._agent = subprocess.Popen(own_agent(self.run.path), env=environ, stdin=null, start_new_session=True)
            self._show()
            self._outputs.pass_on()
            try:
                over = attempt.over(self.config.stall_s, self.config.deadline_s, well=self._ended_well())
            except RunDirectoryError:  # it can be on a file system that has a bad moment
                over = attempt.process.poll() is not None
            if not over:
                self._interrupts.wait(LOOK_S)
        self._show()
        self._progress.close()

    def _end_agent(self) -> None:
        if self._agent is not None:
            self._agent.terminate()
            try:
                self._agent.wait(AGENT_S)
            except subprocess.TimeoutExpired:  # it is stopped
                self._agent.kill()
                self._agent.wait()
            self._agent = None

    def _show(self) -> None:
        status = self._status()
        if status is None:
            return
        with contextlib.suppress(OSError):  # a terminal that is gone
            self._progress.show(status)
        if status.state in ("starting", "failed"):
            return
        if not self._settled:
            self._settle()
        if self._settled and not self._kept:
            with contextlib.suppress(OSError):  # such as a full disk, which may have room at the next look
                self.run.put_launch(self.launch)
                self._kept = True

    def _settle(self) -> None:
        """Take over what the script itself sets: the job has said what came of all settings."""
        with contextlib.suppress(RunDirectoryError):
            for started in _starts(self.run)[self._starts :]:
                self.config, self._settled = build(started.settings), True

    def _heed(self) -> bool:
        """Act on the signals that have come; True if the job is to end now."""
        if self._interrupts.again:
            lose(self.run, f"interrupted: the supervisor on {HOST} received {self._interrupts.again}", "interrupted")
            return True
        if self._interrupts.first and not self._asked:
            self._asked = True
            text = "stopping at the next step, with a checkpoint"
            try:
                self.run.ask(Request("stop"))
            except OSError as error:
                text = f"the job can't be asked to stop: {error.strerror}"
            self._say(f"{text}; Ctrl-C again ends it now")
        return False

    def _status(self) -> Status | None:
        try:
            return self.run.status()
        except RunDirectoryError:
            return None

    def _ended_well(self) -> bool:
        status = self._status()
        return status is not None and status.state in WELL and not self.run.failed()

    def _say(self, *lines: str) -> None:
        with contextlib.suppress(OSError):
            self._progress.tell("\n".join(f"hpc_elastic: {line}" for line in lines))

    # --- when it is over ----------------------------------------------------------------------------------------------

    def _verdict(self, attempt: Attempt) -> int | None:
        """Return the exit code; the run's own record decides, since launchers end with what they like."""
        self._settle()
        failure, status = self.run.failure(), self._status()
        if self._ended_well() and status is not None and (status.state == "ended" or not self._interrupts.first):
            if status.state == "stopped":
                self._say(f"stopped at step {status.step}; {self._hint()}")
            return EXIT_OK
        if self._interrupts.first:
            stopped = status is not None and status.state == "stopped"
            text = f"stopped at step {status.step}" if status and stopped else "the job ended before it could stop"
            if status is not None and not stopped:
                lose(self.run, text, "interrupted")
            return self._interrupted(failure.error if failure else text)
        if failure is not None and failure.kind != "lost":
            told = [] if failure.told else [failure.error]  # else the rank has said it
            self._say(*told, f"run directory {self.run.path}")
            return EXIT_FAILED
        self._reached = self._reached or attempt.hangs != "" or bool(self.run.records())
        code = attempt.process.returncode
        return self._lost(failure, code) if self._reached else self._never_reached(failure, code)

    def _clean_checkpoints(self) -> None:
        """Remove what there is of checkpoints that were not finished."""
        folder = Path(self.launch.directory) / checkpoint_folder(self.config, self.run.path)
        Store(folder).clean()

    def _never_reached(self, failure: Failure | None, code: int) -> int:
        """Say that no rank came to ``he.run``, which a restart would not change."""
        if failure is None and code == 0:
            why = f"{self.launch.script} ended without calling he.run(train): nothing was run"
            self._say(why)
            if self._new:
                self.run.remove_unused()
            else:
                lose(self.run, why, "error")
            return EXIT_NEVER_RAN
        why = (
            failure.error if failure else f"the job ended early (the launcher ended with {code}): see above what it printed"
        )
        if failure is None:
            lose(self.run, why, "error")
        self._say(f"{why}; run directory {self.run.path}")
        return EXIT_FAILED

    def _lost(self, failure: Failure | None, code: int) -> int | None:
        """Start the job again, if that can help."""
        ends = self.run.ends()
        if failure is None:
            bad = [
                f"process {end.member} (pid {end.pid} on {end.host}) {end.how()}" for end in ends if end.code or end.signal
            ]
            reason = "; ".join([*bad[:1], f"the launcher ended with {code} before the job had"])
            lose(self.run, reason)
        else:
            reason = failure.error
        status = self._status()
        own = status is not None and status.state != "starting"  # else it is of the attempt before
        step = failure.step if failure and failure.step >= 0 else status.step if status and own else -1
        words = tuple(map(_last_words, [end for end in ends if end.last_words][:PROCESSES]))
        self._setbacks.append(Setback(self.run.attempt(), step, reason, words))
        why = why_not(self._setbacks, self.config.restarts)
        try:
            return self._give_up(why) if why else self._again(told=failure is not None and failure.told)
        except OSError as error:
            return self._give_up(f"the run directory can't be used: {error}")

    def _give_up(self, why: str) -> int:
        self._say(f"given up: {why}", *account(self._setbacks), f"run directory {self.run.path}", self._hint())
        return EXIT_FAILED

    def _again(self, *, told: bool) -> int | None:
        """Put the attempt away and wait until it is time for the next one. Return the exit code if a signal comes."""
        last, number = self._setbacks[-1], len(self._setbacks)
        seconds, status = wait_s(number), self._status()
        attempt = self.run.retire_attempt() + 1
        log = events.EventLog(self.run.events)
        log.mend()
        log.write(events.Restarted(attempt=attempt, step=last.step, reason=last.reason, wait_s=seconds))
        title = f"restart {number} of {self.config.restarts}"
        if status is not None:
            self.run.put_status(launching.starting(status, title))
        later = f" in {seconds:g} s" if seconds else ""
        self._say(*([] if told else [last.reason]), f"{title}{later}, {self.origin()}")
        deadline = time.monotonic() + seconds
        while not self._interrupts.first and time.monotonic() < deadline:
            self._interrupts.wait(deadline - time.monotonic())
        if not self._interrupts.first:
            return None
        text = f"interrupted: the supervisor on {HOST} received {self._interrupts.first} before it started the job again"
        lose(self.run, text, "interrupted")
        return self._interrupted(text)

    def _interrupted(self, text: str) -> int:
        self._say(text, f"run directory {self.run.path}", self._hint())
        return EXIT_INTERRUPTED

    def _hint(self) -> str:
        return f"go on {self.origin()}, with: hpc-elastic resume {shlex.quote(str(self.run.path))}"


def _starts(run: RunDirectory) -> list[events.Started]:
    return [event for event in events.read(run.events) if isinstance(event, events.Started)]


def _last_words(end: End) -> str:
    lines = end.last_words.rstrip().splitlines()[-LINES:]
    return "\n".join(
        [f"process {end.member} (pid {end.pid} on {end.host}) {end.how()}; last words:", *(f"  {x}" for x in lines)]
    )
