"""Accounting: MariaDB and slurmdbd."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import configuration, processes, spaces
from .configuration import Shape

UP_S = 60.0
GRANTS = (
    "create database slurm_acct",
    *(f"create user slurm@'{host}' identified by 'slurm'" for host in ("127.0.0.1", "localhost")),
    *(f"grant all on slurm_acct.* to slurm@'{host}'" for host in ("127.0.0.1", "localhost")),
)


def up(
    shape: Shape, folder: Path, host: str, ports: Sequence[int], start: Callable[..., None], run: Callable[..., Any]
) -> None:
    """Bring both up, and make the cluster known."""
    processes.need("mariadbd", "mariadb", "mariadb-install-db", "slurmdbd", "sacctmgr")
    data = folder / "database"
    # A server that begins removes all temporary tables it finds, also those of others.
    temporary = folder / "tables"
    temporary.mkdir(mode=0o700)
    own = ["--no-defaults", "--user=root", f"--datadir={data}", f"--tmpdir={temporary}"]
    make = ["mariadb-install-db", *own, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(make, check=True, capture_output=True, timeout=UP_S)
    socket = f"--socket={folder}/database.socket"
    own += [socket, "--bind-address=127.0.0.1", f"--port={ports[2]}"]
    quick = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
    start("mariadbd", ["mariadbd", *own, *quick], spaces.CONTROLLER)
    client = ["mariadb", "--no-defaults", "--user=root", socket]

    def tell(statement: str) -> bool:
        return subprocess.run([*client, "-e", statement], check=False, capture_output=True).returncode == 0

    processes.until(lambda: tell("select 1"), UP_S, "MariaDB")
    for statement in GRANTS:
        if not tell(statement):
            raise processes.ClusterError(f"MariaDB: {statement!r} failed")
    conf = folder / "slurmdbd.conf"
    conf.write_text(configuration.slurmdbd_conf(shape, folder, host, ports))
    conf.chmod(0o600)
    start("slurmdbd", ["slurmdbd", "-D"], spaces.CONTROLLER)
    manager = ["sacctmgr", "--noheader", "--immediate"]
    processes.until(lambda: run([*manager, "list", "cluster"], check=False).returncode == 0, UP_S, "slurmdbd")
    run([*manager, "add", "cluster", "test"], check=False)
