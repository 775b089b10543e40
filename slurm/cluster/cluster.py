"""The cluster: brought up, looked at, disturbed, and taken down without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from . import accounting, configuration, processes, spaces
from .configuration import PORTS, Shape
from .processes import ClusterError

MARK = "_CLUSTER_FOR_TESTS"  # in the environment of all that runs in it
UP_S, DOWN_S = 60.0, 20.0
FOLDERS = ("log", "munge", "pid", "spool", "state")
DAEMONS = ("slurmctld", "slurmdbd", "mariadbd", "munged")


class Cluster:
    """A Slurm cluster of this machine. As a context manager it is up inside the block.

    Parameters
    ----------
    folder : Path
        Where all its state is; made, for its owner alone.
    shape : Shape
        What it is to be like; one that is up already has its own.
    """

    def __init__(self, folder: Path, shape: Shape | None = None) -> None:
        self.folder = folder.absolute()
        self.shape = shape or self._kept_shape()

    def _kept_shape(self) -> Shape:
        import json

        try:
            kept = json.loads((self.folder / "shape.json").read_text())
        except (OSError, ValueError):
            raise ClusterError(f"{self.folder} has no cluster: bring one up there first") from None
        return Shape(**{**kept, "extra": tuple(kept["extra"])})

    @property
    def environ(self) -> dict[str, str]:
        """The environment of commands that are to speak to the cluster."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf"), MARK: str(self.folder)}

    @contextlib.contextmanager
    def in_environ(self) -> Iterator[None]:
        """Have this process's own commands speak to the cluster inside a ``with`` block."""
        before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = self.environ["SLURM_CONF"]
        try:
            yield
        finally:
            if before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = before

    # --- up and down --------------------------------------------------------------------------------------------------

    def up(self) -> Self:
        """Bring it up and wait until all nodes are idle; take all down again if that fails."""
        processes.need("slurmctld", "slurmd", "munged", "sinfo", "srun")
        if self.shape.nodes < 1:
            raise ClusterError(f"{self.shape.nodes} nodes: a cluster has at least one")
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ClusterError(f"{self.folder} is not empty: take the cluster there down, or name another folder")
        try:
            with processes.free_ports(PORTS + (0 if self.shape.isolate else self.shape.nodes)) as ports:
                self._up(ports)
        except BaseException:
            self.down()
            raise
        return self

    def _up(self, ports: Sequence[int]) -> None:
        import dataclasses
        import json

        folder, shape, host = self.folder, self.shape, socket.gethostname().split(".")[0]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o755)  # munge wants its socket's folder to be open; what is secret in it is not
        for name in FOLDERS:
            (folder / name).mkdir(mode=0o700)
        (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(shape)))
        (folder / "slurm.conf").write_text(configuration.slurm_conf(shape, folder, host, ports))
        (folder / "hosts").write_text(configuration.hosts(shape))
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.start_munge(waits=False)
        if shape.isolate:
            spaces.make(shape, folder, self.environ)
        processes.until((folder / "munge.socket").exists, UP_S, "munged")
        if shape.accounting:
            accounting.up(shape, folder, host, ports, self._start, self.run)
        self._start("slurmctld", ["slurmctld", "-D"], spaces.CONTROLLER)
        for name in shape.names:
            (folder / "spool" / name).mkdir()
            self.start_node(name)
        processes.until(self._all_idle, UP_S + shape.nodes / 5, "all nodes idle; see log/slurmctld.log")

    def _munge(self) -> list[str]:
        f = self.folder
        return [
            f"--key-file={f}/munge/key",
            f"--socket={f}/munge.socket",
            f"--pid-file={f}/munge/pid",
            f"--log-file={f}/log/munged.log",
            f"--seed-file={f}/munge/seed",
            "--num-threads=4",
        ]

    def _start(self, name: str, command: list[str], node: str = "") -> None:
        inside = spaces.inside(self.folder, node) if node and self.shape.isolate else []
        processes.start(self.folder, name, [*inside, *command], self.environ)

    def start_node(self, name: str) -> None:
        """Start slurmd on node `name`."""
        self._start(name, ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")], name)

    def _all_idle(self) -> bool:
        if not processes.pid_of(self.folder, "slurmctld"):
            raise ClusterError(f"slurmctld ended: {self._last_words('slurmctld')}")
        for name in self.shape.names:
            if not processes.pid_of(self.folder, name):
                raise ClusterError(f"slurmd of {name} ended: {self._last_words(name)}")
        done = self.run(["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"], check=False)
        return sum(map(int, done.stdout.split())) == self.shape.nodes

    def _last_words(self, name: str) -> str:
        """Return the last lines a daemon wrote: in its log, or, if it ended before it had one, as its output."""
        for kind in ("log", "out"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.folder / "log" / f"{name}.{kind}").read_text().strip().splitlines()
                if lines:
                    return "; ".join(lines[-3:])
        return "it did not say why"

    def down(self) -> None:
        """End all jobs and daemons, and remove the folder."""
        if not (self.folder / "pid").is_dir():
            return
        with contextlib.suppress(ClusterError, OSError, subprocess.TimeoutExpired):
            if processes.pid_of(self.folder, "slurmctld"):
                self.run(["scancel", "--full", "--user=root"], check=False, limit_s=5)
                deadline = time.monotonic() + DOWN_S / 4
                while self.run(["squeue", "--noheader"], check=False, limit_s=5).stdout and time.monotonic() < deadline:
                    time.sleep(0.05)
        pids = [processes.pid_of(self.folder, path.name) for path in (self.folder / "pid").iterdir()]
        daemons = [processes.pid_of(self.folder, name) for name in DAEMONS]
        first = [processes.pid_of(self.folder, f"{name}.init") for name in (spaces.CONTROLLER, *self.shape.names)]
        processes.end([pid for pid in first if pid], signal.SIGKILL)  # with all that is in their nodes
        others = [pid for pid in pids if pid and pid not in daemons and processes.alive(pid)]
        processes.end(others)
        processes.end([pid for pid in daemons if pid])
        processes.end(processes.marked(f"{MARK}={self.folder}"))
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- what is done with it -----------------------------------------------------------------------------------------

    def command(self, command: Sequence[str], node: str = "") -> list[str]:
        """Return how `command` is run on the controller's host, or on a `node`: with `environ`."""
        if node and node not in self.shape.names:
            raise ClusterError(f"no node {node}: there are {', '.join(self.shape.names[:8])}")
        inside = spaces.inside(self.folder, node or spaces.CONTROLLER) if self.shape.isolate else []
        return [*inside, *map(str, command)]

    def run(
        self, command: Sequence[str], node: str = "", *, check: bool = True, limit_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there and return what came of it.

        Raises
        ------
        ClusterError
            If it fails, and `check` is true.
        """
        done = subprocess.run(
            self.command(command, node), env=self.environ, capture_output=True, text=True, check=False, timeout=limit_s
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def status(self) -> str:
        """Return nodes and jobs, for people."""
        nodes = self.run(["sinfo", "--Node", "--format=%8N %10P %12T %20E"]).stdout
        return nodes + "\n" + self.run(["squeue", "--format=%8i %12j %10P %8T %10M %6D %20R"]).stdout

    def states(self) -> dict[str, str]:
        """Return the state of each node, as sinfo has it."""
        lines = self.run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"]).stdout.splitlines()
        return dict(line.split() for line in lines)

    def crash(self, node: str) -> None:
        """End a node at once, with all that runs on it: power off for an isolated one, slurmd and its jobs for another."""
        self.command([], node)
        name = f"{node}.init" if self.shape.isolate else node
        pid = processes.pid_of(self.folder, name)
        if not pid:
            raise ClusterError(f"node {node} is down")
        pids = [pid] if self.shape.isolate else [*_below(pid), pid]
        for each in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, 9)
        processes.until(lambda: not processes.alive(pid), DOWN_S, f"the crash of {node}")

    def cut(self, node: str) -> None:
        """Take the network of an isolated node away."""
        self._of_isolated("cut off")
        self.command([], node)
        spaces.cut(self.shape, self.folder, node, off=True)

    def mend(self, node: str) -> None:
        """Give it back."""
        self._of_isolated("mended")
        self.command([], node)
        spaces.cut(self.shape, self.folder, node, off=False)

    def _of_isolated(self, what: str) -> None:
        if not self.shape.isolate:
            raise ClusterError(f"only an isolated node can be {what}: bring the cluster up with --isolate")

    def stop_munge(self) -> None:
        """End munged."""
        processes.end([pid for pid in [processes.pid_of(self.folder, "munged")] if pid])

    def start_munge(self, *, waits: bool = True) -> None:
        """Start munged, and wait until it serves."""
        self._start("munged", ["munged", "--foreground", "--force", *self._munge()])
        if waits:
            processes.until(
                lambda: (
                    self.run(["munge", f"--socket={self.folder}/munge.socket", "--no-input"], check=False).returncode == 0
                ),
                UP_S,
                "munged",
            )

    def stop_controller(self) -> None:
        """End slurmctld, as for a change of its configuration."""
        processes.end([pid for pid in [processes.pid_of(self.folder, "slurmctld")] if pid])

    def start_controller(self) -> None:
        """Start slurmctld again, with the state that it had."""
        self._start("slurmctld", ["slurmctld", "-D"], spaces.CONTROLLER)


def _below(pid: int) -> list[int]:
    """Return all descendants of a process."""
    found, rest = [], [pid]
    while rest:
        each = rest.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                children = [int(n) for n in (task / "children").read_text().split()]
                found += children
                rest += children
    return found
