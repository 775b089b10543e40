"""Slurm read: recorded output of 22.05, 24.11 and 26.05, a form made by hand for 23.02, and a stand-in
of pyslurm's documented API.

The output was recorded on clusters of four nodes, and cut down to a few jobs and rows.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.broker.slurm import choosing, decoding, hosts, text
from hpc_elastic.broker.slurm.calls import Calls, Output, clean
from hpc_elastic.broker.slurm.commands import Commands
from hpc_elastic.broker.slurm.library import Library
from hpc_elastic.errors import ConfigError, SlurmError, SlurmMissing, SlurmRefused, SlurmUnreachable

RECORDED = Path(__file__).parent / "slurm_recorded"
PARTITION = (
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=a,b Default=YES QoS=N/A DefaultTime=00:10:00 GraceTime=5 "
    "MaxNodes=UNLIMITED MaxTime=1-00:00:00 MinNodes=0 Nodes=n[1-4] PriorityTier=10 OverSubscribe=NO PreemptMode=CANCEL "
    "State=UP TotalCPUs=8 TotalNodes=4"
)


def recorded(version, command):
    return (RECORDED / f"{version}-{command}.json").read_bytes()


class Recorded(Calls):
    """Answers with recorded output, and keeps what was run."""

    def __init__(self, answers, limit_s=5.0):
        super().__init__(limit_s)
        self.answers = answers
        self.ran = []

    def run(self, args, stdin="", limit_s=None):
        self.ran.append((tuple(args), stdin, limit_s))
        answer = self.answers[args[0] if args[-1] != "--version" else "version"]
        return answer if isinstance(answer, Output) else Output(answer, "", 0)


def answers(version="22.05"):
    return {
        "squeue": recorded(version, "squeue"),
        "sinfo": recorded(version, "sinfo"),
        "version": f"slurm {version}.8\n".encode(),
        "scontrol": PARTITION.encode(),
        "sbatch": b"17;lab\n",
        "scancel": b"",
    }


class RPCError(Exception):
    """pyslurm's."""

    def __init__(self, errno, msg):
        super().__init__(msg)
        self.errno = errno


class Lenient(SimpleNamespace):
    """An object of pyslurm: what isn't set is None, as it is there."""

    def __getattr__(self, name):
        return None


def pyslurm():
    """A stand-in of what pyslurm's documentation describes, with the jobs and nodes of the recorded output."""
    array = {"array_id": 2, "array_tasks_waiting": "1-3%1", "dependencies": {"afterany": [1], "satisfy": "all"}}
    victim = {"allocated_nodes": "n1", "preempt_time": 100, "end_time": 105, "gres_per_node": {"gpu:a100": 2}}
    jobs = {
        2: Lenient(id=2, name="wrap", state="PENDING", partition="requeue", num_nodes=1, resource_sharing="no", **array),
        6: Lenient(id=6, name="wrap", state="RUNNING", partition="cancel", num_nodes=1, resource_sharing="no", **victim),
        1: Lenient(id=1, name="run", state="PENDING", comment="hello", num_nodes=2, time_limit=5, is_requeueable=True),
    }
    nodes = {
        "n1": Lenient(name="n1", state="ALLOCATED", total_cpus=2, allocated_cpus=2, real_memory=4000, partitions=["main"]),
        "n4": Lenient(name="n4", state="IDLE+DRAIN", total_cpus=2, allocated_cpus=0, real_memory=4000, reason="x"),
    }
    main = Lenient(name="main", state="UP", is_default=True, nodes="n[1-4]", total_nodes=4, max_time_limit=1440,
                   default_time=10, max_nodes="UNLIMITED", preemption_grace_time=5, preempt_mode="CANCEL", priority_tier=10,
                   allowed_accounts=["ALL"], allowed_qos=["a", "b"])  # fmt: skip

    def job(number):
        if number not in jobs:
            raise RPCError(2017, "Invalid job id specified")
        return jobs[number]

    return SimpleNamespace(
        __version__="25.11.0",
        RPCError=RPCError,
        Jobs=SimpleNamespace(load=lambda: jobs),
        Nodes=SimpleNamespace(load=lambda: nodes),
        Partitions=SimpleNamespace(load=lambda: {"main": main}),
        Job=SimpleNamespace(load=job),
    )


class TestContract:
    """Both implementations say the same of the same cluster."""

    @pytest.fixture(params=["commands", "library"])
    def slurm(self, request):
        commands = Commands(Recorded(answers()))
        return commands if request.param == "commands" else Library(pyslurm(), commands)

    def test_nodes(self, slurm):
        busy, drained = slurm.snapshot().nodes
        assert (busy.name, busy.states, busy.cpus, busy.cpus_allocated, busy.memory_mib) == ("n1", {"allocated"}, 2, 2, 4000)
        assert drained.states == {"idle", "drain"}
        assert drained.broken
        assert not drained.idle
        assert drained.reason == "x"

    def test_jobs(self, slurm):
        seen = slurm.snapshot()
        assert seen.job(1).time_limit_s == 300
        assert seen.job(1).comment == "hello"
        assert seen.job(1).requeue
        assert not seen.job(1).exclusive
        array = seen.job(2)
        assert (array.array_id, array.array_task, array.array_tasks, array.time_limit_s) == (2, None, "1-3%1", None)
        assert array.pending
        assert array.exclusive
        victim = seen.job(6)
        assert victim.running
        assert victim.nodes == "n1"
        assert victim.grace_end_s == victim.preempt_s + 5
        assert seen.job(1).grace_end_s is None

    def test_own_job(self, slurm):
        assert slurm.own_job(1).name == "run"
        assert slurm.own_job(999) is None

    def test_partitions(self, slurm):
        (main,) = slurm.partitions()
        assert (main.max_time_s, main.default_time_s, main.max_nodes, main.grace_s) == (86400, 600, None, 5)
        assert (main.preempt_mode, main.nodes, main.default, main.up) == ("cancel", "n[1-4]", True, True)
        assert (main.allowed_accounts, main.allowed_qos) == ("all", "a,b")

    def test_submit(self, slurm):
        assert slurm.submit("#!/bin/sh\n", ["-N2"]) == 17


@pytest.mark.parametrize("version", ["22.05", "24.11", "26.05"])
def test_recorded_versions(version):
    nodes = {node.name: node for node in decoding.nodes(recorded(version, "sinfo"))}
    assert set(nodes) == {"n1", "n4"}
    assert nodes["n1"].cpus_allocated == 2
    assert "allocated" in nodes["n1"].states
    assert nodes["n4"].states == {"idle", "drain"}
    assert nodes["n4"].reason == "x"
    assert {"main", "urgent"} <= set(nodes["n4"].partitions)
    victim = next(job for job in decoding.jobs(recorded(version, "squeue")) if job.preempt_s)
    assert victim.running
    assert victim.exclusive
    assert victim.grace_end_s == victim.preempt_s + 5


@pytest.mark.parametrize("version", ["24.11", "26.05"])
def test_what_a_waiting_job_wants(version):
    jobs = {job.id: job for job in decoding.jobs(recorded(version, "squeue"))}
    wide = jobs[6]
    assert (wide.node_count, wide.max_nodes, wide.partitions) == (2, 4, ("main", "urgent"))
    assert (wide.excluded_nodes, wide.memory_node_mib, wide.time_limit_s) == ("n[1-2]", 500, None)
    assert jobs[3].dependency == "afterany:1(unfulfilled)"
    assert jobs[3].exclusive
    assert jobs[7].memory_cpu_mib == 100
    assert jobs[7].shared


def test_form_of_23_02():
    """By hand, after its documentation: numbers are wrapped, states are lists, nodes are still ``nodes``."""
    wrapped = {"set": True, "infinite": False, "number": 12}
    entry = {
        "name": "g1",
        "state": ["MIXED", "NOT_RESPONDING"],
        "features": ["a100"],
        "gres": "gpu:a100:4",
        "alloc_cpus": wrapped,
    }
    (node,) = decoding.nodes(json.dumps({"nodes": [entry], "errors": []}).encode())
    assert (node.states, node.features, node.gres, node.cpus_allocated) == (
        {"mixed", "not_responding"},
        ("a100",),
        "gpu:a100:4",
        12,
    )


@given(st.integers(0, 2**31))
def test_a_number_in_any_form(value):
    forms = (value, str(value), decoding.Wrapped(set=True, infinite=False, number=value))
    wanted = None if value in decoding.NO_VALUES else value
    assert decoding.number(forms[0]) == wanted
    assert decoding.number(forms[1]) == decoding.number(forms[2]) == value


@pytest.mark.parametrize(
    "value", [None, 0xFFFFFFFE, 0xFFFFFFFF, decoding.Wrapped(set=False), decoding.Wrapped(infinite=True)]
)
def test_no_number(value):
    assert decoding.number(value) is None


def test_marks_of_states():
    assert decoding.words("IDLE*") == {"idle", "not_responding"}
    assert decoding.words("down+MAINT") == {"down", "maintenance"}
    assert decoding.words(None) == frozenset()


def test_one_squeue_and_one_sinfo():
    calls = Recorded(answers())
    Commands(calls).snapshot()
    assert sorted(args[0] for args, _, _ in calls.ran) == ["sinfo", "squeue"]


def test_errors_inside_of_json():
    told = json.dumps({"jobs": [], "errors": [{"description": "Failed while looking for jobs", "error": "x"}]}).encode()
    broken = answers() | {"squeue": Output(told, "squeue: error: Munge encode failed", 0)}
    with pytest.raises(SlurmUnreachable, match="Munge"):
        Commands(Recorded(broken)).snapshot()


@pytest.mark.parametrize("told", [b"", b"[]", b'{"jobs": 3}', b"slurm: no JSON"])
def test_what_is_no_json(told):
    with pytest.raises(SlurmError, match=r"22\.05"):
        Commands(Recorded(answers() | {"squeue": told})).snapshot()


@pytest.mark.parametrize(
    ("message", "kind", "hint"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", SlurmRefused, "sinfo lists"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", SlurmRefused, "QOS"),
        ("sbatch: error: Invalid account or account/partition combination specified", SlurmRefused, "What to do"),
        (
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            SlurmRefused,
            "sinfo -Nel",
        ),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", SlurmUnreachable, "later"),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", SlurmUnreachable, "later"),
        ("squeue: fatal: Could not establish a configuration source", SlurmMissing, "SLURM_CONF"),
        ("", SlurmRefused, "code 1"),
    ],
)
def test_refusals(message, kind, hint):
    error = text.refusal("sbatch", message, 1)
    assert type(error) is kind
    assert hint in str(error)


def test_late_answer():
    late = answers() | {"sbatch": Output(b"", "", -15, late=True)}
    with pytest.raises(SlurmUnreachable, match="within 30 s"):
        Commands(Recorded(late)).submit("x")


def test_allocation_not_granted_in_time_is_cancelled():
    calls = Recorded(answers() | {"salloc": Output(b"", "salloc: Pending job allocation 9\n", 1, late=True)})
    with pytest.raises(SlurmRefused, match="job 9"):
        Commands(calls).allocate(["-N1"], limit_s=2)
    assert calls.ran[-1][0] == ("scancel", "9")


def test_cancelling_what_is_over():
    over = Output(b"", "scancel: error: Kill job error on job id 9: Invalid job id specified\n", 1)
    Commands(Recorded({"scancel": over})).cancel([9])
    Commands(Recorded({})).cancel([])
    with pytest.raises(SlurmRefused):
        Commands(Recorded({"scancel": Output(b"", "scancel: error: Access/permission denied", 1)})).cancel([9])


def test_pyslurm_out_of_reach():
    library = pyslurm()

    def down():
        raise RPCError(1800, "Unable to contact slurm controller (connect failure)")

    library.Jobs.load = down
    with pytest.raises(SlurmUnreachable):
        Library(library, Commands(Recorded(answers()))).snapshot()


@pytest.mark.parametrize(("release", "kind"), [("25.11", Library), ("22.05", Commands)])
def test_choosing(monkeypatch, release, kind):
    monkeypatch.setitem(__import__("sys").modules, "pyslurm", pyslurm())
    choice = choosing.choose(Recorded(answers() | {"version": f"slurm-wlm {release}.2\n".encode()}))
    assert isinstance(choice.slurm, kind)
    assert release in choice.reason


def test_no_command():
    with pytest.raises(SlurmMissing, match="PATH"):
        Calls().run(["squeue-of-nowhere"])


def test_a_command_at_its_limit():
    assert Calls().run(["sleep", "60"], limit_s=0.05).late


def test_what_a_command_has_started_ends_with_it():
    """It would hold the pipes open."""
    began = time.monotonic()
    assert Calls().run(["sh", "-c", "sleep 60; true"], limit_s=0.05).late
    assert time.monotonic() - began < 30


def test_environment():
    given = {"SLURM_JOB_ID": "1", "SLURM_CONF": "c", "SBATCH_PARTITION": "p", "PMI_FD": "3", "HOME": "h"}
    assert clean(given) == {"SLURM_CONF": "c", "HOME": "h", "LC_ALL": "C"}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("5", 300),
        ("1:30", 90),
        ("01:00:00", 3600),
        ("1-0", 86400),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
        ("NONE", None),
    ],
)
def test_durations(written, seconds):
    assert text.duration_s(written) == seconds


def test_no_duration():
    with pytest.raises(SlurmError, match="no duration"):
        text.duration_s("soon")
    assert text.duration(5) == "1"


def test_hosts():
    assert hosts.names("n[1-3,10]") == ("n1", "n2", "n3", "n10")
    assert hosts.names("") == ()
    assert hosts.folded(["n3", "n1", "n2"]) == "n[1-3]"
    with pytest.raises(ConfigError, match="host list"):
        hosts.names("n[1-")


def test_settings():
    assert (
        text.settings("Configuration data\nSchedulerParameters     = a=1,b\nX = (null)\n")["SchedulerParameters"] == "a=1,b"
    )
