"""How each of the systems is started, and told to take a worker or to give one back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from hpc_elastic.comm.vendor import prepare

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
END_S = 10.0


class System:
    """A job of one of the systems, in `folder`: a context manager that ends it.

    Attributes
    ----------
    process : Popen
        What the job ends with.
    """

    name: ClassVar[str]
    settings: ClassVar[str]  # in words, for the record

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        self.folder, self.arguments = folder, [str(folder), *arguments]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = (folder / "log").open("ab")
        self.process = self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            with contextlib.suppress(ProcessLookupError):  # its group: a launcher that was stuck leaves its workers behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._log.close()

    @classmethod
    def missing(cls) -> str:
        """Return why it can't be run here, or nothing."""
        raise NotImplementedError

    def start(self) -> subprocess.Popen[bytes]:
        """Start it with one worker."""
        raise NotImplementedError

    def add(self) -> None:
        """Have it take a second worker."""
        raise NotImplementedError

    def remove(self) -> None:
        """Have it give the second worker back."""
        raise NotImplementedError

    def popen(self, command: Sequence[object], **environ: str) -> subprocess.Popen[bytes]:
        """Start a command of the job's."""
        # A worker has one core.
        own: dict[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        own |= environ
        if self.name == Elastic.name:
            prepare(own)
        out: dict[str, Any] = {"stdout": self._log, "stderr": self._log, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([*map(str, command)], env=own, cwd=self.folder, start_new_session=True, **out)
        self._processes.append(process)
        return process


def _missing(environment: str) -> str:
    log = ROOT / environment / "build.log"
    if (ROOT / environment / ".ready").exists():
        return ""
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1] if log.exists() else ""
    return f"no {environment}: {f'it could not be built: {last}' if last else 'make it with benchmarks/peers/setup.sh'}"


class Elastic(System):
    """hpc_elastic, this one."""

    name = "hpc_elastic"
    settings = "defaults: 16 microbatches, policy manual; two slots; the ledger"

    @classmethod
    def missing(cls) -> str:
        return ""

    def start(self) -> subprocess.Popen[bytes]:
        options = ["--run-dir", self._run, "--slots", "2", "--progress", "off", "--set", "ledger=true"]
        return self.popen([*self._program, "run", *options, HERE / "elastic_job.py", *self.arguments])

    def add(self) -> None:
        self.popen([*self._program, "resize", self._run, "2"])

    def remove(self) -> None:
        self.popen([*self._program, "resize", self._run, "1"])

    @property
    def _run(self) -> Path:
        return self.folder / "run"

    @property
    def _program(self) -> list[str]:
        return [sys.executable, "-m", "hpc_elastic.cli"]


class Horovod(System):
    """Horovod Elastic, with Gloo. Two names of this machine are its two hosts, since it drops the host of a lost worker."""

    name = "horovod"
    settings = "0.28.1 with TensorFlow 2.13.1 and Gloo; a commit every 10 steps; a host for each worker; defaults else"

    @classmethod
    def missing(cls) -> str:
        return _missing(".venv-horovod")

    def start(self) -> subprocess.Popen[bytes]:
        script = self.folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        self._have("localhost:1")
        environment = ROOT / ".venv-horovod" / "bin"
        numbers = ["-np", "1", "--min-np", "1", "--max-np", "2", "--host-discovery-script", script]
        command = [environment / "horovodrun", "--gloo", *numbers, "--network-interfaces", "lo"]
        path = f"{environment}:{os.environ['PATH']}"
        return self.popen([*command, environment / "python", HERE / "horovod_job.py", *self.arguments], PATH=path)

    def add(self) -> None:
        self._have("localhost:1", "127.0.0.1:1")

    def remove(self) -> None:
        self._have("localhost:1")

    @property
    def _hosts(self) -> Path:
        return self.folder / "hosts"

    def _have(self, *hosts: str) -> None:
        beside = self._hosts.with_suffix(".new")
        beside.write_text("\n".join(hosts) + "\n")
        beside.rename(self._hosts)


class Torchrun(System):
    """Two agents of torchrun, a worker each."""

    name = "torchrun"
    settings = "2.13 with Gloo; c10d rendezvous, --max-restarts 3; a snapshot every 10 steps; an agent for each worker"

    @classmethod
    def missing(cls) -> str:
        return _missing(".venv-torch")

    def start(self) -> subprocess.Popen[bytes]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        return self._agent()

    def add(self) -> None:
        self._second = self._agent()

    def remove(self) -> None:
        self._second.terminate()

    def _agent(self) -> subprocess.Popen[bytes]:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self._port}", "--rdzv-id", "peers"]
        numbers = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"]
        command = [ROOT / ".venv-torch" / "bin" / "torchrun", *numbers, *rendezvous, HERE / "torch_job.py", *self.arguments]
        return self.popen(command, GLOO_SOCKET_IFNAME="lo", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


SYSTEMS: dict[str, type[System]] = {each.name: each for each in (Elastic, Horovod, Torchrun)}
