"""The cluster for tests: it is real, it can be disturbed, and nothing is left of it."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from slurm.cluster import Cluster, ClusterError, processes
from slurm.cluster.cluster import MARK
from slurm.cluster.configuration import Shape, slurm_conf

from ..launch import ROOT

LIMIT_S = 60.0


def until(done, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tool(*words):
    command = [ROOT / "slurm" / "hpc-elastic-cluster", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_up_and_down_leave_nothing(tmp_path):
    folder = tmp_path / "c"
    done = tool("up", "--nodes", "3", "--dir", folder)
    assert done.returncode == 0, done.stderr
    assert "3 nodes are up" in done.stdout
    assert "n3" in tool("status", "--dir", folder).stdout
    out = tool("run", "--dir", folder, "--", "srun", "-N", "3", "sh", "-c", "echo $SLURMD_NODENAME").stdout
    assert sorted(out.split()) == ["n1", "n2", "n3"]
    tool("run", "--dir", folder, "--", "sbatch", "--output=/dev/null", "--wrap", "sleep 1000")
    assert tool("down", "--dir", folder).returncode == 0
    assert not folder.exists()
    assert not processes.marked(f"{MARK}={folder}")


def test_bystanders_are_let_be(tmp_path):
    """Who has the configuration in the environment, as `up` advises, is no part of it; nor is who has an old number."""
    up = Cluster(tmp_path / "c", Shape(1)).up()
    conf = {**os.environ, "SLURM_CONF": up.environ["SLURM_CONF"]}
    with subprocess.Popen(["sleep", "60"], env=conf) as one, subprocess.Popen(["sleep", "60"]) as other:
        (up.folder / "pid" / "old").write_text(f"{other.pid} 1")
        up.down()
        assert (one.poll(), other.poll()) == (None, None)
        one.kill()
        other.kill()


@pytest.mark.parametrize("isolate", [False, True])
def test_two_side_by_side(isolate, tmp_path):
    with (
        Cluster(tmp_path / "a", Shape(2, isolate=isolate)) as one,
        Cluster(tmp_path / "b", Shape(3, isolate=isolate)) as two,
    ):
        assert len(one.states()) == 2
        assert len(two.states()) == 3
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_does_not_come_up_leaves_nothing(tmp_path):
    with pytest.raises(ClusterError, match=r"ended: .*NoSuchSetting"):
        Cluster(tmp_path / "c", Shape(2, extra=("NoSuchSetting=1",))).up()
    assert not (tmp_path / "c").exists()
    assert not processes.marked(f"{MARK}={tmp_path}/c")


@pytest.mark.parametrize("kinds", [("out",), ("log", "out"), ()])
def test_what_a_daemon_said_last(kinds, tmp_path):
    """Also one that ended before it had a log."""
    one = Cluster(tmp_path, Shape(2))
    (tmp_path / "log").mkdir()
    for kind in kinds:
        (tmp_path / "log" / f"n1.{kind}").write_text(f"hello\nfatal in {kind}\n")
    assert one._last_words("n1") == (f"hello; fatal in {kinds[0]}" if kinds else "it did not say why")


def test_one_whose_daemons_were_killed(tmp_path):
    up = Cluster(tmp_path / "c", Shape(2)).up()
    for name in ("slurmctld", "munged", "n1"):
        os.kill(processes.pid_of(up.folder, name), 9)
    Cluster(tmp_path / "c").down()
    assert not (tmp_path / "c").exists()


def test_a_crash(nodes):
    """Slurm notices by itself, and the job that ran there is lost."""
    where = nodes.run(["hostname"], "n2").stdout.strip()
    assert where == "n2"
    number = nodes.run(
        ["sbatch", "--parsable", "--nodelist=n2", "--no-requeue", "--output=/dev/null", "--wrap", "sleep 1000"]
    )
    state = ["squeue", "--noheader", "--states=all", "--format=%T", "--job", number.stdout.strip()]
    until(lambda: nodes.run(state).stdout.strip() == "RUNNING")
    nodes.crash("n2")
    until(lambda: nodes.states()["n2"].startswith("down"))
    assert nodes.run(state).stdout.strip() == "NODE_FAIL"
    with pytest.raises(ClusterError, match="n2 is down"):
        nodes.crash("n2")


def test_a_network_that_is_cut(nodes):
    port = int(
        next(line for line in (nodes.folder / "slurm.conf").read_text().splitlines() if "SlurmdPort" in line).split("=")[1]
    )
    reach = ["timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/n2/{port}"]
    assert nodes.run(reach, "n1", check=False).returncode == 0
    nodes.cut("n2")
    assert nodes.run(reach, "n1", check=False).returncode != 0
    nodes.mend("n2")
    until(lambda: nodes.run(reach, "n1", check=False).returncode == 0)


def test_preemption_gives_grace(cluster, tmp_path):
    """A job of the low partition is told, has its grace time, and makes room."""
    listens, told = tmp_path / "listens", tmp_path / "told"
    step = f"srun sh -c 'trap \"touch {told}; exit\" TERM; touch {listens}; while :; do sleep 0.1; done'"
    low = ["sbatch", "--partition=low", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", step]
    cluster.run(low)
    until(listens.exists)
    cluster.run(["srun", "--partition=urgent", "--nodes=4", "--exclusive", "true"])
    assert told.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--nodes", "0"], "at least one"),
        (["down"], "has no cluster"),
        (["run", "--", "true"], "has no cluster"),
        (["crash", "n1"], "has no cluster"),
    ],
)
def test_bad_input(words, said, tmp_path):
    done = tool(words[0], "--dir", tmp_path / "none", *words[1:])
    assert done.returncode == 1
    assert said in done.stderr


def test_bad_names(cluster):
    for act in (cluster.crash, cluster.cut, cluster.mend):
        with pytest.raises(ClusterError):
            act("n99")
    with pytest.raises(ClusterError, match="not empty"):
        Cluster(cluster.folder, Shape()).up()


def test_help():
    done = tool("--help")
    assert done.returncode == 0
    assert "srun -N 2 hostname" in done.stdout


def test_configuration_names_every_node(tmp_path):
    text = slurm_conf(Shape(3), tmp_path, "host", [1, 2, 3, 4, 5, 6])
    assert [line.split()[0] for line in text.splitlines() if line.startswith("NodeName")] == [
        "NodeName=n1",
        "NodeName=n2",
        "NodeName=n3",
    ]
