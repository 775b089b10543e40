"""The command line of the cluster for tests.

python -m slurm.cluster up --nodes 4 --dir cluster
python -m slurm.cluster run --dir cluster -- srun -N 2 hostname
python -m slurm.cluster status --dir cluster
python -m slurm.cluster crash n2 --dir cluster
python -m slurm.cluster down --dir cluster
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from .cluster import Cluster
from .configuration import Shape
from .processes import ClusterError


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="hpc-elastic-cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--dir", type=Path, required=True, help="the cluster's folder, which is made by `up`")
        return made

    up = command("up", "bring a cluster up")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--cpus", type=int, default=4, help="CPUs that each node pretends to have")
    up.add_argument("--isolate", action="store_true", help="give each node namespaces of its own (root)")
    up.add_argument("--accounting", action="store_true", help="with MariaDB and slurmdbd")
    up.add_argument("--grace", type=int, default=10, metavar="SECONDS", help="of jobs that are preempted")
    up.add_argument("--extra", action="append", default=[], metavar="LINE", help="another line of slurm.conf")
    command("down", "end all jobs and daemons and remove the folder")
    command("status", "show nodes and jobs")
    run = command("run", "run a command that speaks to the cluster; put -- before it")
    run.add_argument("--node", default="", help="on this node, instead of the controller's host")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    for name, text in (("crash", "end a node at once"), ("cut", "take its network away"), ("mend", "give that back")):
        command(name, text).add_argument("node")
    given = parser.parse_args()
    try:
        return act(given)
    except ClusterError as error:
        print(f"hpc-elastic-cluster: {error}", file=sys.stderr)
        return 1


def act(given: argparse.Namespace) -> int:
    """Carry a command out."""
    if given.command == "up":
        shape = Shape(
            given.nodes,
            given.cpus,
            isolate=given.isolate,
            accounting=given.accounting,
            grace_s=given.grace,
            extra=tuple(given.extra),
        )
        begun = time.monotonic()
        cluster = Cluster(given.dir, shape).up()
        print(f"{shape.nodes} nodes are up after {time.monotonic() - begun:.1f} s")
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf" if not shape.isolate else "speak to them with `run`")
        return 0
    cluster = Cluster(given.dir)
    if given.command == "down":
        cluster.down()
    elif given.command == "status":
        print(cluster.status(), end="")
    elif given.command == "run":
        words = given.words[1:] if given.words[:1] == ["--"] else given.words
        if not words:
            raise ClusterError("no command: write it behind --, as in `run --dir DIR -- sinfo`")
        full = cluster.command(words, given.node)
        sys.stdout.flush()
        os.execvpe(full[0], full, cluster.environ)
    else:
        {"crash": cluster.crash, "cut": cluster.cut, "mend": cluster.mend}[given.command](given.node)
    return 0


if __name__ == "__main__":
    sys.exit(main())
