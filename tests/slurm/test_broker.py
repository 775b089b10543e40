"""Jobs on a real cluster that take idle nodes, and give them back when others want them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.broker.slurm import leases
from hpc_elastic.broker.slurm.calls import Calls
from hpc_elastic.rundir import RunDirectory

from .. import shards
from ..afterwards import check_ledger, happened, resizes
from ..launch import ROOT, SCRIPTS, hpc_elastic

EPOCHS, SHORT, BATCH = 40, 8, 64
LIMIT_S = 120.0


def until(done, limit_s=LIMIT_S):
    deadline = time.monotonic() + limit_s
    while not (found := done()):
        assert time.monotonic() < deadline, f"not within {limit_s} s"
        time.sleep(0.05)
    return found


class Elastic:
    """An elastic job in a batch job of one node. It takes its time until its end is waited for."""

    def __init__(self, cluster, folder):
        self.cluster = cluster
        self.path = folder / "r"
        self.folder = folder
        self.enough = folder / "enough"
        self.out = folder / "out"
        shards.write(folder)

    def submit(self, *options, sbatch=(), pause_s=0.1, epochs=EPOCHS, **settings):
        self.epochs = epochs
        script = [SCRIPTS / "softmax.py", self.folder, epochs, "--batch", BATCH, "--until", self.enough, "--pause"]
        settings = {"broker": "slurm", "ledger": "true", "stall_s": 5, "checkpoint_steps": 50, **settings}
        pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        command = hpc_elastic("run", "--run-dir", self.path, "--max", 4, *pairs, *options, *script, pause_s)
        text = f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(str(ROOT))}\nexec {shlex.join(command)}\n"
        (self.folder / "job.sh").write_text(text)
        out = [f"--output={self.out}", f"--chdir={self.folder}"]
        done = self.cluster.run(["sbatch", "--parsable", "--nodes=1", "--exclusive", *out, *sbatch, self.folder / "job.sh"])
        self.number = done.stdout.strip()

    @property
    def run(self):
        return RunDirectory(self.path)

    def ranks(self, n):
        """Wait until it has so many ranks."""
        until((self.path / "status.json").exists)
        until(lambda: (status := self.run.status()) is not None and status.ranks == n)

    def steps(self, n):
        """Wait until it has done so many more steps."""
        before = self.run.status().step
        until(lambda: self.run.status().step >= before + n)

    def refused(self):
        """Return why it did not grow, in lower case."""
        return [event.reason.lower() for event in happened(self.path, events.Refused)]

    def most(self):
        """Return how many ranks it has had at most."""
        return max([1, *(event.after for event in resizes(self.path))])

    def states(self, *what):
        command = ["squeue", "--noheader", "--states=all", "--format=%T", *what]
        return self.cluster.run(command).stdout.split()

    def companions(self):
        """Return the states of its companions in the queue."""
        lines = self.cluster.run(["squeue", "--noheader", "--states=all", "--format=%j %T"]).stdout.splitlines()
        return [line.split()[1] for line in lines if line.split()[0].endswith("+")]

    def ends(self):
        """Have it go on without pauses, wait for its end, and return what it printed."""
        self.enough.touch()
        until(lambda: self.states("--job", self.number)[0] not in ("PENDING", "RUNNING", "COMPLETING"))
        until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(self.companions()))
        return self.out.read_text()

    def ended_well(self, static):
        out = self.ends()
        assert f"sha256 {static}" in out, out
        assert self.states("--job", self.number) == ["COMPLETED"]
        check_ledger(self.path, self.epochs, shards.SAMPLES)


def computed(cluster, folder, epochs):
    """Return what one static rank computes."""
    job = Elastic(cluster, folder)
    job.submit(broker="local", slots=1, pause_s=0, epochs=epochs)
    out = job.ends()
    return next(line.split()[1] for line in out.splitlines() if line.startswith("sha256"))


@pytest.fixture(scope="module")
def static(cluster, tmp_path_factory):
    return computed(cluster, tmp_path_factory.mktemp("static"), EPOCHS)


@pytest.fixture(scope="module")
def static_short(cluster, tmp_path_factory):
    return computed(cluster, tmp_path_factory.mktemp("static"), SHORT)


@pytest.fixture
def job(cluster, tmp_path):
    made = Elastic(cluster, tmp_path)
    yield made
    cluster.run(["scancel", "--full", "--user=root"])
    until(lambda: not cluster.run(["squeue", "--noheader"]).stdout)


def test_takes_idle_nodes_and_gives_them_to_who_waits(job, cluster, static):
    job.submit(sbatch=["--time=60"])
    job.ranks(4)
    assert set(cluster.states().values()) == {"allocated"}
    until(lambda: all(each["end"] for each in leases.found(job.path)))
    said = cluster.run(hpc_elastic("status", job.path)).stdout
    for each in leases.found(job.path):
        assert 0 < each["end"] - time.time() <= 3600
        assert f"companion {each['companion']}: {each['node']}, job {each['job']}, for 1 rank, held since" in said
    assert said.count("at the latest") == 3
    begun = time.monotonic()
    cluster.run(["srun", "--nodes=2", "--exclusive", "true"])
    waited_s = time.monotonic() - begun
    job.ranks(4)
    job.ended_well(static)
    sizes = [event.after for event in resizes(job.path)]
    assert sizes[0] > 1
    assert 2 in sizes
    reasons = [event.reason for event in happened(job.path, events.Decided)]
    assert 1 not in sizes, f"more was given back than somebody waited for: {reasons}"
    assert any("idle node" in reason for reason in reasons)
    assert any("could start with 2 more nodes" in reason for reason in reasons)
    assert waited_s < 20
    assert set(job.companions()) <= {"COMPLETED", "CANCELLED"}


def test_leaves_idle_nodes_to_who_waits_for_them(job, cluster, static):
    """Of four nodes, one job waits for a dependency, which needs none, and one will start on two in a moment."""
    cluster.run(["sbatch", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000"])
    job.submit()
    job.ranks(2)
    job.steps(50)
    job.ended_well(static)
    assert max(event.after for event in resizes(job.path)) == 2


def test_preemption(job, cluster, static):
    """The companions stand in a partition of which an urgent job takes nodes; the job's own node is safe."""
    job.submit(slurm_options="--partition=low", policy="greedy")
    job.ranks(4)
    begun = time.monotonic()
    cluster.run(["srun", "--partition=urgent", "--nodes=2", "--exclusive", "true"])
    assert time.monotonic() - begun < cluster.shape.grace_s
    job.ended_well(static)
    assert any("it is preempted" in event.reason for event in happened(job.path, events.Decided))
    assert not happened(job.path, events.Lost)


def test_a_drained_node_is_given_back(job, cluster, static):
    job.submit()
    job.ranks(4)
    node = next(member.slot for member in job.run.status().members if member.slot > 0) // 1024 - 1
    name = json.loads((job.path / "companions" / f"{node}.held.json").read_text())["node"]
    cluster.run(["scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test"])
    try:
        until(lambda: any(name in event.reason for event in happened(job.path, events.Decided)))
        job.ended_well(static)
    finally:
        cluster.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"])
    assert not happened(job.path, events.Lost)


def test_a_companion_that_is_cancelled(job, cluster, static):
    """Its ranks are lost, or leave, and the others go on."""
    job.submit()
    job.ranks(4)
    lines = cluster.run(["squeue", "--noheader", "--format=%i %j"]).stdout.splitlines()
    number = next(line.split()[0] for line in lines if line.endswith("+"))
    cluster.run(["scancel", number])
    until(lambda: happened(job.path, events.Lost) or any(event.left for event in resizes(job.path)))
    job.ended_well(static)
    assert not happened(job.path, events.Restarted)


def test_slurmctld_is_away(job, cluster, static):
    """Nothing can be asked for for 20 s; the steps go on."""
    job.submit(pause_s=0.06)
    job.ranks(4)
    cluster.stop_controller()
    seen, longest_s = [(time.monotonic(), job.run.status().step)], 0.0
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.05)
            if (step := job.run.status().step) != seen[-1][1]:
                longest_s = max(longest_s, time.monotonic() - seen[-1][0])
                seen.append((time.monotonic(), step))
    finally:
        cluster.start_controller()
    assert longest_s < Calls().limit_s, "a step has waited for one of Slurm's commands"
    assert seen[-1][1] > seen[0][1] + 100
    job.ended_well(static)


@pytest.mark.parametrize("victim", ["supervisor", "rank 0", "batch script"])
def test_whatever_is_killed_no_companion_stays(victim, job, cluster, static):
    job.submit(restarts=0 if victim == "supervisor" else 2)
    job.ranks(4)
    if victim == "batch script":
        cluster.run(["scancel", "--full", "--signal=KILL", job.number])
    else:
        rank = job.run.status().members[0].pid
        pid = rank if victim == "rank 0" else above(rank, "hpc_elastic.cli")
        os.kill(pid, signal.SIGKILL)
    if victim == "rank 0":
        job.ended_well(static)
    else:
        if victim == "supervisor":
            job.enough.touch()  # the job goes on to its end
        until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(job.companions()), 60)


def above(pid, name):
    """Return the ancestor of a process whose command line has the `name`."""
    while name.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return pid


def test_an_agent_that_is_killed(job, cluster, static):
    """Nothing on its node would end the companion then: the leader does, and goes on without its ranks."""
    job.submit()
    job.ranks(4)
    held = json.loads(next(job.path.glob("companions/*.held.json")).read_text())
    os.kill(held["pid"], signal.SIGKILL)
    until(lambda: held["allocation"] not in cluster.run(["squeue", "--noheader", "--format=%i"]).stdout.split(), 60)
    job.ended_well(static)
    assert not happened(job.path, events.Restarted)


def test_replacements_on_companions_are_forked(job, static):
    """A companion's agent sees to a warm parent there."""
    job.submit(warm="on")
    job.ranks(4)
    lost = job.run.status().members[-1]
    until((job.path / "warm" / f"{lost.host}.sock").exists)
    os.kill(lost.pid, signal.SIGKILL)
    until(lambda: "warm" in [event.how for event in happened(job.path, events.Ready) if event.host == lost.host])
    job.ended_well(static)
    assert not happened(job.path, events.Restarted)


def test_companions_that_are_batch_jobs(job, static_short):
    job.submit(companions="sbatch", epochs=SHORT, pause_s=0.5)
    job.ranks(4)
    job.ended_well(static_short)


def test_limits_of_node_hours(job, static):
    """They are used up by the time that the newcomers are there: it has four ranks for a step or so."""
    job.submit(node_hours=0.0001)
    until((job.path / "events.jsonl").exists)
    until(lambda: any("node_hours" in event.reason for event in happened(job.path, events.Decided)))
    until(lambda: [event.after for event in resizes(job.path)][-1:] == [1])
    job.ended_well(static)
    assert job.most() == 4
    assert resizes(job.path)[-1].after == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--partition=nowhere", "partition"),
        ("--account=nobody --qos=none", ""),
        ("--mem=99999999", ""),
        ("--constraint=nothing", ""),
    ],
)
def test_companions_that_are_refused(options, said, job, static_short):
    """The job goes on at its size, and says why it can't grow."""
    job.submit(slurm_options=options, patience_s=1, epochs=SHORT, pause_s=0.5)
    until((job.path / "events.jsonl").exists)
    if options.startswith("--account"):
        job.ranks(4)  # without accounting, Slurm takes any
    else:
        until(lambda: any(said in reason for reason in job.refused()))
        job.steps(10)
        assert not resizes(job.path)
    job.ended_well(static_short)


def test_not_in_a_slurm_job(tmp_path, cluster):
    shards.write(tmp_path)
    command = hpc_elastic("run", "--set", "broker=slurm", SCRIPTS / "softmax.py", tmp_path, 1)
    done = cluster.run(["env", "-C", tmp_path, "-u", "SLURM_JOB_ID", f"PYTHONPATH={ROOT}", *command], check=False)
    assert done.returncode == 1
    assert "needs a Slurm job" in done.stderr
