"""Isolated nodes: each in namespaces of its own, network and hostname too, on a bridge of the controller's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from . import processes
from .configuration import NET, Shape, address
from .processes import ClusterError

CONTROLLER = "ctl"
UNSHARE = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The first process of a node: its end is the node's crash. It reaps what is left to it.
INIT = """
import os, signal, sys
folder, name = sys.argv[1:]
run = lambda *command: os.spawnvp(os.P_WAIT, command[0], command) == 0 or sys.exit(f"{command} failed")
run("hostname", name)
run("mount", "--bind", f"{folder}/hosts", "/etc/hosts")
run("mount", "-t", "tmpfs", "shm", "/dev/shm")
run("ip", "link", "set", "lo", "up")
open(f"{folder}/pid/{name}.ready", "x").close()
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.signal(signal.SIGCHLD, lambda *_: None)
while True:
    signal.pause()
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


def make(shape: Shape, folder: Path, environ: Mapping[str, str]) -> None:
    """Make the controller's and all nodes' namespaces, and connect them."""
    if os.geteuid() != 0:
        raise ClusterError("isolated nodes need namespaces, which take root: leave --isolate out")
    processes.need("unshare", "nsenter", "ip")
    for name in (CONTROLLER, *shape.names):
        processes.start(
            folder, f"{name}.space", [*UNSHARE, "/usr/bin/python3", "-I", "-S", "-c", INIT, str(folder), name], environ
        )
    for name in (CONTROLLER, *shape.names):
        processes.until((folder / "pid" / f"{name}.ready").exists, 10, f"namespaces of {name}")
        processes.note(folder, f"{name}.init", _child(processes.pid_of(folder, f"{name}.space")))
    lines = ["link add br0 type bridge", "link set br0 up", f"addr add {NET}.1/24 dev br0"]
    for i, name in enumerate(shape.names):
        lines += [f"link add v{i} type veth peer name eth0 netns {init(folder, name)}", f"link set v{i} master br0 up"]
    _ip(folder, CONTROLLER, lines)
    for i, name in enumerate(shape.names):
        _ip(folder, name, [f"addr add {address(i)}/24 dev eth0", "link set eth0 up"])


def _ip(folder: Path, name: str, lines: list[str]) -> None:
    command = ["nsenter", "-t", str(init(folder, name)), "-n", "ip", "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", text=True, capture_output=True, check=False, timeout=30)
    if done.returncode:
        raise ClusterError(f"the network of {name} can't be set up: {done.stderr.strip()}")


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def init(folder: Path, name: str) -> int:
    """Return the first process of node `name`; `ClusterError` if it does not run."""
    pid = processes.pid_of(folder, f"{name}.init")
    if not pid:
        raise ClusterError(f"node {name} is down")
    return pid


def inside(folder: Path, name: str) -> list[str]:
    """Return the start of a command that is to run on node `name`."""
    return ["nsenter", "-t", str(init(folder, name)), "-n", "-u", "-i", "-m", "-p", f"--wd={os.getcwd()}", "--"]


def cut(shape: Shape, folder: Path, name: str, *, off: bool) -> None:
    """Take the network of node `name` away, or give it back."""
    _ip(folder, CONTROLLER, [f"link set v{shape.names.index(name)} {'down' if off else 'up'}"])
