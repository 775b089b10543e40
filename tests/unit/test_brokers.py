"""The brokers keep to the contract; the local one reads what the machine has, within the limits set on this process."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.broker import local
from hpc_elastic.broker.local import LocalBroker, Machine, Slot, read_machine, room
from hpc_elastic.broker.script import ScriptBroker
from hpc_elastic.broker.slots import Slots
from hpc_elastic.errors import ConfigError
from hpc_elastic.model import Lease

from .broker_contract import BrokerContract

GIB = 1 << 30


class TestLocalCores(BrokerContract):
    def make(self, total, leases=()):
        return LocalBroker(leases=leases, read=lambda: Machine(total, 64 * GIB, 0), clock=lambda: 0.0)


class TestLocalSlots(BrokerContract):
    def make(self, total, leases=()):
        return LocalBroker(total, leases=leases, read=lambda: Machine(1, 64 * GIB, 0), clock=lambda: 0.0)


class TestLocalGpus(BrokerContract):
    def make(self, total, leases=()):
        return LocalBroker(leases=leases, gpus_per_rank=1, read=lambda: Machine(99, 64 * GIB, total), clock=lambda: 0.0)


class TestScript(BrokerContract):
    def make(self, total, leases=()):
        return ScriptBroker(((0, total),), leases)


def test_a_script_says_when_it_changes():
    broker = ScriptBroker.parse("0:1,7:3,8:2,20:5")
    for step in range(30):
        supply, until = broker.poll(step, 0.0, 1), broker.next_step(step)
        assert all(broker.poll(later, 0.0, 1) == supply for later in range(step, int(min(until, 40))))
        assert until == math.inf or broker.poll(int(until), 0.0, 1) != supply


# --- the scripted broker --------------------------------------------------------------------------------------------------


def test_the_script_is_followed():
    broker = ScriptBroker.parse("5:1, 20:3,40:2")
    assert broker.entries == ((5, 1), (20, 3), (40, 2))
    assert [broker.next_step(step) for step in (0, 4, 5, 39, 40)] == [5, 5, 20, 40, math.inf]
    for step, offered in ((0, 0), (4, 0), (5, 1), (19, 1), (20, 3), (39, 3), (40, 2), (1000, 2)):
        assert broker.poll(step, 0.0, 1).offered == offered


def test_the_highest_slots_are_taken_back_first():
    broker = ScriptBroker.parse("0:3,10:1,20:2", (Lease(2), Lease(0), Lease(1)))
    assert broker.poll(9, 0.0, 1).revoked == ()
    supply = broker.poll(10, 0.0, 1)
    assert {lease.slot for lease in supply.revoked} == {1, 2}
    assert supply.offered == 0
    assert len(supply.leases) == 3, "they are held until they are given back"
    assert [lease.slot for lease in broker.poll(20, 0.0, 1).revoked] == [2]
    broker.release(supply.revoked)
    supply = broker.poll(20, 0.0, 1)
    assert (supply.offered, supply.revoked) == (1, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not STEP:SLOTS"),
        ("5", "'5' is not"),
        ("5:", "'5:' is not"),
        ("-1:2", "'-1:2' is not"),
        ("5:²", "'5:²' is not"),
        ("0:1,0:2", "step 0 comes after step 0"),
        ("9:1,3:2", "step 3 comes after step 9"),
    ],
)
def test_a_script_that_makes_no_sense(text, message):
    with pytest.raises(ConfigError, match="supply: .*" + message):
        ScriptBroker.parse(text)


# --- how many ranks fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "slot", "held", "peak", "offered", "why"),
    [
        (Machine(8, 64 * GIB, 0), Slot(), 0, 1, 8, "8 cores, 0 in use"),
        (Machine(8, 64 * GIB, 0), Slot(cores=2), 3, 1, 1, "8 cores, 2 a rank, 3 in use"),
        (Machine(7, 64 * GIB, 0), Slot(cores=4), 0, 1, 1, "7 cores"),
        (Machine(2, 64 * GIB, 0), Slot(), 3, 1, 0, "2 cores"),
        (Machine(2, 64 * GIB, 0), Slot(slots=5), 3, 1, 2, "5 slots, 3 in use"),
        (Machine(2, 64 * GIB, 0), Slot(slots=0), 0, 1, 0, "0 slots"),
        (Machine(64, 64 * GIB, 4), Slot(gpus=1), 1, 1, 3, "4 GPUs, 1 a rank, 1 ranks"),
        (Machine(64, 64 * GIB, 5), Slot(gpus=2), 1, 1, 1, "5 GPUs"),
        (Machine(64, 64 * GIB, 0), Slot(gpus=1), 0, 1, 0, "0 GPUs"),
        (Machine(64, 10 * GIB, 0), Slot(), 3, GIB, 9, "10240 MiB free, a rank takes 1024 MiB"),
        (Machine(64, 10 * GIB, 0), Slot(), 3, 20 * GIB, 0, "10240 MiB free"),
        (Machine(4, 10 * GIB, 0), Slot(), 0, GIB, 4, "4 cores"),
        (Machine(4, 64 * GIB, 0), Slot(), 0, 0, 4, "4 cores"),
    ],
)
def test_room(machine, slot, held, peak, offered, why):
    got, text = room(machine, slot, held, peak)
    assert got == offered
    assert why in text


@given(
    st.builds(Machine, st.integers(0, 64), st.integers(0, 64 * GIB), st.integers(0, 8)),
    st.integers(0, 20),
    st.none() | st.integers(0, 20),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 8 * GIB),
)
def test_room_overbooks_nothing(machine, held, slots, cores, gpus, peak):
    offered, why = room(machine, Slot(cores, gpus, slots), held, peak)
    assert offered >= 0
    assert why
    if offered:
        ranks = held + offered
        assert ranks * cores <= machine.cores if slots is None else ranks <= slots
        assert ranks * gpus <= machine.gpus
        assert offered * peak <= machine.free_bytes * 0.9
    tight = held + offered + 1  # one more must break a limit
    assert (
        (tight * cores > machine.cores if slots is None else tight > slots)
        or tight * gpus > machine.gpus
        or (offered + 1) * max(peak, 1) > int(machine.free_bytes * 0.9)
    )


def test_the_measured_peak_limits_the_offer():
    broker = LocalBroker(read=lambda: Machine(16, 10 * GIB, 0), clock=lambda: 0.0)
    assert broker.poll(0, 0.0, 1).offered == 16
    assert broker.poll(0, 0.0, 3 * GIB).offered == 3
    broker.request(9, 60.0)
    assert len(broker.poll(0, 0.0, 3 * GIB).leases) == 3


def test_memory_promised_is_not_promised_again():
    """A newcomer needs a while to take its memory; until the machine is read anew, it counts all the same."""
    clock = SimpleNamespace(now=0.0)
    broker = LocalBroker(read=lambda: Machine(16, 10 * GIB, 0), clock=lambda: clock.now)
    assert broker.poll(0, 0.0, GIB).offered == 9
    broker.request(4, 60.0)
    assert broker.poll(0, 0.0, GIB).offered == 5
    broker.request(9, 60.0)
    assert len(broker.poll(0, 0.0, GIB).leases) == 9
    assert broker.poll(0, 0.0, GIB).offered == 0
    clock.now = 1.0  # the ten that are free now are those besides the nine ranks'
    assert broker.poll(0, 0.0, GIB).offered == 7


def test_the_machine_is_read_once_a_second_at_most():
    clock, machines = (
        SimpleNamespace(now=0.0),
        iter([Machine(1, 64 * GIB, 0), Machine(2, 64 * GIB, 0), Machine(3, 64 * GIB, 0)]),
    )
    broker = LocalBroker(read=lambda: next(machines), clock=lambda: clock.now)
    found = []
    for clock.now in (0.0, 0.5, 0.9, 1.0, 1.9, 2.1, 2.2):
        found.append(broker.poll(0, 0.0, 1).offered)
    assert found == [1, 1, 1, 2, 2, 3, 3]


# --- what the machine has -------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 16 cores and 64 GiB free, whose other figures are in files below the folder returned."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


def test_a_machine_without_limits(root):
    assert read_machine(root) == Machine(16, 64 * GIB, 0)


V2 = "sys/fs/cgroup/job/step"
V2_ROOT = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "cores", "free"),
    [
        ({f"{V2}/cpu.max": "300000 100000"}, 3, 64 * GIB),
        ({f"{V2}/cpu.max": "250000 100000"}, 2, 64 * GIB),
        ({f"{V2}/cpu.max": "50000 100000"}, 1, 64 * GIB),
        ({f"{V2}/cpu.max": "9900000 100000"}, 16, 64 * GIB),
        ({f"{V2}/cpu.max": "max 100000"}, 16, 64 * GIB),
        ({f"{V2}/cpu.max": "max 100000", f"{V2_ROOT}/job/cpu.max": "400000 100000"}, 4, 64 * GIB),
        ({f"{V2}/cpu.max": "800000 100000", f"{V2_ROOT}/job/cpu.max": "400000 100000"}, 4, 64 * GIB),
        ({f"{V2}/cpu.max": "200000 100000", f"{V2_ROOT}/job/cpu.max": "400000 100000"}, 2, 64 * GIB),
        ({f"{V2_ROOT}/cpu.max": "500000 100000"}, 5, 64 * GIB),
        ({f"{V2}/cpu.max": "nonsense"}, 16, 64 * GIB),
        ({f"{V2}/memory.max": 8 * GIB, f"{V2}/memory.current": 3 * GIB}, 16, 5 * GIB),
        ({f"{V2}/memory.max": 2 * GIB, f"{V2}/memory.current": 3 * GIB}, 16, 0),
        ({f"{V2}/memory.max": "max", f"{V2}/memory.current": 3 * GIB}, 16, 64 * GIB),
        ({f"{V2}/memory.max": 999 * GIB, f"{V2}/memory.current": 3 * GIB}, 16, 64 * GIB),
        ({f"{V2}/memory.max": 8 * GIB}, 16, 64 * GIB),
        (
            {
                f"{V2}/memory.max": "max",
                f"{V2}/memory.current": 1 * GIB,
                f"{V2_ROOT}/job/memory.max": 9 * GIB,
                f"{V2_ROOT}/job/memory.current": 7 * GIB,
            },
            16,
            2 * GIB,
        ),
    ],
)
def test_cgroup_v2(root, files, cores, free):
    write(root, {"proc/self/cgroup": "0::/job/step", **files})
    assert read_machine(root) == Machine(cores, free, 0)


def test_cgroup_v2_of_a_container(root):
    """Its own group is the top; the path in /proc is the host's and is not there."""
    write(root, {"proc/self/cgroup": "0::/docker/abc", f"{V2_ROOT}/cpu.max": "200000 100000"})
    assert read_machine(root).cores == 2
    write(root, {"proc/self/cgroup": "0::/", f"{V2_ROOT}/cpu.max": "300000 100000"})
    assert read_machine(root).cores == 3


V1 = "12:memory:/job/step\n4:cpu,cpuacct:/job/step\n1:name=systemd:/job\n0::/job"


@pytest.mark.parametrize(
    ("files", "cores", "free"),
    [
        ({"cpu/job/step/cpu.cfs_quota_us": 300000, "cpu/job/step/cpu.cfs_period_us": 100000}, 3, 64 * GIB),
        ({"cpu/job/step/cpu.cfs_quota_us": -1, "cpu/job/step/cpu.cfs_period_us": 100000}, 16, 64 * GIB),
        ({"cpu/job/cpu.cfs_quota_us": 200000, "cpu/job/cpu.cfs_period_us": 50000}, 4, 64 * GIB),
        ({"cpu/cpu.cfs_quota_us": 600000, "cpu/cpu.cfs_period_us": 100000}, 6, 64 * GIB),
        ({"memory/job/step/memory.limit_in_bytes": 4 * GIB, "memory/job/step/memory.usage_in_bytes": GIB}, 16, 3 * GIB),
        ({"memory/job/memory.limit_in_bytes": 4 * GIB, "memory/job/memory.usage_in_bytes": 2 * GIB}, 16, 2 * GIB),
        ({"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": GIB}, 16, 64 * GIB),
    ],
)
def test_cgroup_v1(root, files, cores, free):
    write(root, {"proc/self/cgroup": V1} | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert read_machine(root) == Machine(cores, free, 0)


def test_file_pages_that_can_be_dropped_count_as_free(root):
    files = {
        f"{V2}/memory.max": 8 * GIB,
        f"{V2}/memory.current": 7 * GIB,
        f"{V2}/memory.stat": f"anon 5\ninactive_file {2 * GIB}",
    }
    write(root, {"proc/self/cgroup": "0::/job/step", **files})
    assert read_machine(root).free_bytes == 3 * GIB


def test_limits_of_other_groups_do_not_count(root):
    write(
        root,
        {
            "proc/self/cgroup": "0::/job/step",
            f"{V2_ROOT}/job/other/cpu.max": "100000 100000",
            "cpu.max": "100000 100000",
        },
    )
    assert read_machine(root).cores == 16


def test_gpus_are_counted(root, monkeypatch):
    write(
        root,
        {f"dev/{name}": "" for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia0x", "null")},
    )
    assert read_machine(root).gpus == 3
    for visible, gpus in (("", 0), ("-1", 0), ("2", 1), ("0, 1", 2), ("GPU-5a1b,MIG-77", 2), ("0,-1,1", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert read_machine(root).gpus == gpus, visible


def test_the_affinity_limits_the_cores(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5})
    write(root, {"proc/self/cgroup": "0::/", f"{V2_ROOT}/cpu.max": "400000 100000"})
    assert read_machine(root).cores == 2


def test_this_machine_can_be_read():
    machine = read_machine()
    assert machine.cores >= 1
    assert machine.free_bytes > 0
    assert local.RESERVE == 0.1


def test_a_barred_slot_rests():
    """A slot where a rank could not start is not offered for a while; the others are."""
    now = [0.0]
    slots = Slots((), lambda: now[0])
    slots.grant(3, 3)
    slots.release((Lease(1), Lease(2)), 10.0)
    assert slots.barred == 2
    slots.grant(1, 1)
    assert [lease.slot for lease in slots.leases] == [0, 3]
    now[0] = 10.5
    assert slots.barred == 0
    slots.grant(2, 2)
    assert [lease.slot for lease in slots.leases] == [0, 3, 1, 2]


def test_a_barred_slot_is_no_longer_held():
    slots = Slots((Lease(0),), lambda: 0.0)
    slots.release((Lease(5),), 10.0)
    assert slots.barred == 0
    slots.release((Lease(0),), 10.0)
    assert (slots.leases, slots.barred) == ((), 1)


@pytest.mark.parametrize("broker", [ScriptBroker(((0, 3),), (Lease(0),)), LocalBroker(3, leases=(Lease(0),))])
def test_brokers_offer_no_barred_slots(broker):
    broker.poll(0, 0.0, 1)
    broker.request(1, 1.0)
    broker.release((Lease(1),), 100.0)
    supply = broker.poll(0, 0.0, 1)
    assert supply.offered == 1
    assert "could not start" in supply.why
    broker.request(5, 1.0)
    assert [lease.slot for lease in broker.poll(0, 0.0, 1).leases] == [0, 2]
