"""The doctor: it probes the machine at hand for real, and names what is wrong where something is."""

from __future__ import annotations

import mmap
import subprocess
import sys
from importlib import metadata

import msgspec
import psutil
import pytest

from hpc_elastic import doctor
from hpc_elastic.broker.local import read_machine
from hpc_elastic.comm import vendor
from hpc_elastic.comm.vendor import VENDORS, find_mpiexec
from hpc_elastic.doctor import Check, ProbeError, examine, run_limited, table
from hpc_elastic.errors import LaunchError
from tests.launch import until

PYTHON = [sys.executable, "-P", "-c"]


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in examine()}


def test_what_is_looked_at(checks):
    assert list(checks) == [
        "Python",
        "MPI library",
        "mpiexec",
        "MPI_Init",
        "spawn under mpiexec",
        "spawn from plain python",
        "h5py",
        "TensorFlow",
        "CuPy",
        "slots",
        "shared memory",
        "leftovers",
        "Slurm",
    ]


def test_this_machine_is_good(checks):
    """The tests of the project need the same things as its users' jobs."""
    assert [check for check in checks.values() if check.needed and not check.good] == []
    assert checks["spawn from plain python"].good, checks["spawn from plain python"].text


def test_texts(checks):
    path, found = find_mpiexec()
    assert checks["MPI library"].text.startswith(found.title)
    assert metadata.version("mpi4py") in checks["MPI library"].text
    assert checks["mpiexec"].text == f"{path}, {found.title}"
    assert checks["mpiexec"].facts == found.facts
    assert "thread level multiple" in checks["MPI_Init"].text
    assert "merged in" in checks["spawn under mpiexec"].text
    assert checks["h5py"].text.startswith(metadata.version("h5py"))
    assert checks["slots"].text.startswith(f"{read_machine().cores} cores")
    assert all(check.advice for check in checks.values() if not check.good)


def test_nothing_heavy_is_imported():
    """In a process of its own: here other tests have imported what they like."""
    code = "import sys, hpc_elastic.doctor as d; d._optional(); print(*[m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not {"tensorflow", "keras", "cupy", "mpi4py", "h5py"} & set(loaded.split())
    assert "msgspec" in loaded.split()


def test_table(checks, capsys):
    table(list(checks.values()))
    out = " ".join(capsys.readouterr().out.split())
    for what, how in checks["mpiexec"].facts.items():
        assert f"{what} {how}" in out
    assert "Jobs can run here." in out


def test_table_of_what_is_wrong(capsys):
    bad = Check(name="mpiexec", good=False, needed=True, text="[none]", advice="install [it]")
    table([bad, Check(name="Slurm", good=False, needed=False, text="no", advice="as you like")])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0][0] == "FAIL"
    assert ["->", "install [it]"] in lines
    assert lines[2][0] == "-"
    assert ["Jobs", "can't run here: mpiexec"] in lines


def test_checks_are_json(checks):
    assert msgspec.json.decode(msgspec.json.encode(list(checks.values())), type=list[Check]) == list(checks.values())


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_no_mpiexec(monkeypatch):
    def nowhere():
        raise LaunchError("no mpiexec found")

    monkeypatch.setattr(doctor, "find_mpiexec", nowhere)
    monkeypatch.setattr(doctor, "_spawn", lambda name, *_, needed, **__: Check(name=name, good=True, needed=needed, text=""))
    found = doctor._mpi()
    assert [(check.name, check.good) for check in found] == [
        ("MPI library", True),
        ("mpiexec", False),
        ("spawn from plain python", True),
    ]
    assert "pip install" in found[1].advice


def test_launcher_of_another_mpi(monkeypatch):
    path, own = find_mpiexec()
    other = next(vendor for vendor in VENDORS if vendor is not own)
    monkeypatch.setattr(doctor, "find_mpiexec", lambda: (path, other))
    check, _ = doctor._mpiexec(own)
    assert not check.good
    assert check.needed
    assert f"{other.title}, but the library is {own.title}" in check.text
    assert check.facts == {}


def test_no_library(monkeypatch):
    def broken(*_):
        raise ProbeError("exit code 1: RuntimeError: cannot load MPI library")

    monkeypatch.setattr(doctor, "_probe", broken)
    library, launcher = doctor._mpi()
    assert (library.good, library.needed) == (False, True)
    assert "cannot load" in library.text
    assert "pip install" in library.advice
    assert not launcher.good


@pytest.mark.parametrize("level", ["single", "serialized"])
def test_too_few_threads(level, monkeypatch):
    monkeypatch.setattr(doctor, "_probe", lambda *_: {"init_s": 0.1, "threads": level})
    check = doctor._init([])
    assert not check.good
    assert "MPI_THREAD_MULTIPLE" in check.advice


@pytest.mark.parametrize("out", ["print('nonsense')", "pass"])
def test_probe_that_says_nothing_useful(out, tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(out)
    monkeypatch.setattr(doctor, "PROBE", tmp_path / "probe.py")
    check = doctor._spawn("spawn", [], needed=True, advice="try")
    assert not check.good
    assert "unexpected answer" in check.text


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_SHARED_BYTES", 1 << 62)
    check = doctor._shared_memory()
    assert not check.good
    assert "--shm-size" in check.advice


def test_no_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "absent")
    check = doctor._shared_memory()
    assert not check.good
    assert "not writable" in check.text


def test_leftovers(tmp_path, monkeypatch):
    """Listed and left where they are; one that a live process maps is none."""
    monkeypatch.setattr(vendor, "SHARED_MEMORY", tmp_path)
    assert doctor._leftovers().good
    dead, alive = tmp_path / "mpich_shm_dead", tmp_path / "sm_segment.alive"
    for path in (dead, alive, tmp_path / "of_somebody_else"):
        path.write_bytes(bytes(mmap.PAGESIZE))
    code = "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); print(flush=True); sys.stdin.read()"
    command = [*PYTHON, code, str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        check = doctor._leftovers()
        process.stdin.close()
    assert not check.good
    assert not check.needed
    assert check.advice == f"rm {dead}"
    assert dead.exists()


@pytest.mark.parametrize(("there", "text"), [((), "not installed"), (("sbatch", "srun"), "without squeue, scontrol")])
def test_slurm(there, text, tmp_path, monkeypatch):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor._slurm()
    assert (check.good, check.needed, check.text) == (False, False, text)


def test_slurm_that_does_not_answer(tmp_path, monkeypatch):
    for name in (*doctor.SLURM, "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = doctor._slurm()
    assert (check.good, check.needed) == (False, False)
    assert "slurmctld or munge is down" in check.text


# --- the limit --------------------------------------------------------------------------------------------------------


def test_command_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    note, usual = tmp_path / "pids", subprocess.Popen.communicate

    def communicate(process, timeout):
        until(lambda: note.exists() and note.read_text().count("\n") == 2)  # the limit counts once both are there
        return usual(process, timeout=timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    code = f"import os,time; os.fork(); open({str(note)!r},'a').write(f'{{os.getpid()}}\\n'); time.sleep(600)"
    with pytest.raises(ProbeError, match=r"no answer within 1 s, so it was killed"):
        run_limited([*PYTHON, code], 1)
    pids = [int(line) for line in note.read_text().splitlines()]
    assert len(pids) == 2
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_limit_reaches_what_mpi_has_spawned(tmp_path, monkeypatch):
    """A newcomer that never comes hangs the spawn in every MPI; the probe ends all the same, with all its processes."""
    begin = "    mpi.Init_thread(mpi.THREAD_MULTIPLE)\n    parent"
    hanging = doctor.PROBE.read_text().replace(begin, "    wait_if_spawned()\n" + begin)
    assert "wait_if_spawned" in hanging
    note = tmp_path / "pids"
    segments = set(doctor.orphaned_shared_memory())
    wait = (
        "def wait_if_spawned():\n    import os\n"
        f"    with open({str(note)!r}, 'a') as file:\n        print(os.getpid(), file=file)\n"
        f"    if len(open({str(note)!r}).readlines()) > 1:\n        time.sleep(600)\n\n\n"
    )
    (tmp_path / "probe.py").write_text(hanging.replace("def library", wait + "def library"))
    monkeypatch.setattr(doctor, "PROBE", tmp_path / "probe.py")
    monkeypatch.setattr(doctor, "LIMIT_S", 14)  # 5 s more than the probe has, in which both must have come to their note
    path, found = find_mpiexec()
    check = doctor._spawn("spawn", [str(path), *found.launch, "-n", "1"], needed=True, advice="try")
    assert not check.good
    pids = [int(line) for line in note.read_text().split()]
    assert len(pids) == 2
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert set(doctor.orphaned_shared_memory()) <= segments


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('no')", "exit code 1: ValueError: no"),
        ("import sys; print('told'); sys.exit(3)", "exit code 3: told"),
        ("import os; os.abort()", "killed by signal 6: no message"),
    ],
)
def test_command_that_fails(code, message):
    with pytest.raises(ProbeError) as caught:
        run_limited([*PYTHON, code], 30)
    assert str(caught.value) == message


def test_command_that_is_not_there():
    with pytest.raises(ProbeError, match="can't be started: No such file"):
        run_limited(["/absent/program"], 30)
