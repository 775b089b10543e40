"""The command line: what it makes of good and of bad input; each kind of trouble has a message and an exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import hpc_elastic
from hpc_elastic import cli, doctor, events, launching, leftovers, scripts, standing
from hpc_elastic.checkpoint import About, Store
from hpc_elastic.config import build
from hpc_elastic.doctor import Check
from hpc_elastic.errors import LaunchError
from hpc_elastic.model import Cursor, Member
from hpc_elastic.rundir import Answer, Failure, Launch, RankRecord, RunDirectory, Status
from hpc_elastic.shards import write_shard
from tests.launch import ROOT, Job, until
from tests.launch import hpc_elastic as command

COMMANDS = (
    *("run", "submit", "resume", "status", "resize", "stop", "checkpoint", "verify"),
    *("doctor", "pack", "inspect", "report", "tensorboard"),
)
LOOP = """
import sys, time
import hpc_elastic as he
def train(job):
    for turn in job.loop(int(sys.argv[1])):
        time.sleep(0.01)
if __name__ == "__main__":
    he.run(train)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in os.environ:
        if name.startswith("HPC_ELASTIC_"):
            monkeypatch.delenv(name)


@pytest.fixture
def script():
    Path("script.py").write_text(LOOP)
    return "script.py"


@pytest.fixture
def run():
    return RunDirectory.create(Path("r"))


def invoke(*arguments, code):
    """Run the program in this process, and return what it wrote on stdout and stderr."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def fails(*arguments, code):
    """Run the program, which has to fail with one line; return that."""
    out, err = invoke(*arguments, code=code)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("hpc-elastic: ")
    return line.removeprefix("hpc-elastic: ")


def now(state="running", **others):
    member = Member(id=4, pid=77, host="n1", slot=2)
    return Status(state=state, time=time.time(), started=0.0, ranks=1, members=(member,), step=3, steps=9, **others)


# --- usage ------------------------------------------------------------------------------------------------------------


def test_version():
    assert invoke("--version", code=0) == (f"hpc-elastic {hpc_elastic.__version__}\n", "")


def test_module_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "hpc_elastic.cli", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"hpc-elastic {hpc_elastic.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_examples_one_a_line(name, option):
    out, _ = invoke(name, option, code=0)
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() in ("Example:", "Examples:"))
    examples = lines[start + 1 : lines.index("", start)]
    assert examples
    assert all(line.startswith(f"    hpc-elastic {name}") for line in examples)
    assert "\b" not in out


def test_all_commands_are_tested():
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("arguments", [(), ("run",), ("pack",), ("inspect",)])
def test_usage_is_shown_without_arguments(arguments):
    out, err = invoke(*arguments, code=2)
    assert (out + err).startswith(f"Usage: {' '.join(['root', *arguments])} ")
    assert "Options:" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status",), "Missing argument 'RUN'"),
        (("resize", "r"), "Missing argument 'RANKS'"),
        (("resize", "r", "many"), "Invalid value for 'RANKS'"),
        (("resize", "r", "2", "--timeout", "-1"), "Invalid value for '--timeout'"),
        (("pack", "x.npz"), "Missing option '--out'"),
        (("run", "--max", "some", "x.py"), "Invalid value for '--max'"),
        (("resume",), "Missing argument 'RUN'"),
        (("resume", "r", "--ranks", "some"), "Invalid value for '-n'"),
        (("verify",), "Missing argument 'WHERE'"),
        (("checkpoint", "r", "--timeout", "-1"), "Invalid value for '--timeout'"),
        (("halt", "r"), "No such command 'halt'"),
        (("run", "--mx", "3", "x.py"), "No such option"),
        *((("run", option, "0", "x.py"), f"'{option}'") for option in ("--min", "--microbatches")),
        *((("run", option, "-1", "x.py"), f"'{option}'") for option in ("--slots", "--min", "--max", "--seed")),
        (("run", "--ranks", "0", "x.py"), "'-n' / '--ranks'"),
        (("resume", "r", "--min", "0"), "'--min'"),
        (("submit", "--max", "-1", "x.py"), "'--max'"),
        (("resize", "r", "0"), "'RANKS'"),
        (("resize", "r", "--", "-1"), "'RANKS'"),
        (("pack", "x.npz", "--out", "x", "--shards", "0"), "'--shards'"),
    ],
)
def test_wrong_usage(arguments, message):
    _, err = invoke(*arguments, code=2)
    assert message in err
    assert "Usage:" in err


# --- run: settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min", "3", "--max", "2"], "min = 3 is more than max = 2"),
        (["--set", "min=0"], "min = 0: must be at least 1"),
        (["--set", "max=-1"], "max = -1: must not be negative"),
        (["-n", "4", "--max", "2"], "ranks = 4 is more than max = 2"),
        (["--policy", "wish"], "'wish'"),
        (["--policy", "timetable"], "needs a timetable"),
        (["--policy", "fixed", "--timetable", "3:2"], "a timetable is given"),
        (["--progress", "loud"], "'loud'"),
        (["--set", "deadline=3"], "unknown setting 'deadline' in the settings; did you mean 'deadline_s'?"),
        (["--set", "deadline_s"], "--set deadline_s: write --set NAME=VALUE"),
        (["--set", "=3"], "--set =3: write --set NAME=VALUE"),
        (["--set", "deadline_s=soon"], "deadline_s"),
        (["--set", "deadline_s=0"], "deadline_s = 0.0: must be positive"),
        (["--set", "broker=script"], "needs a supply"),
        (["--set", "max=many"], "max"),
        (["--config", "absent.toml"], "configuration absent.toml: No such file or directory"),
        (["--config", "."], "configuration .: Is a directory"),
    ],
)
def test_bad_settings(options, message, script):
    assert message in fails("run", *options, script, code=2)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maxx = 3", "unknown setting 'maxx' in job.toml; did you mean 'max'?"),
        ("max = ", "job.toml is not valid TOML"),
        ('max = "many"', "max"),
        ("max = 1.5", "max"),
        ("min = 3\nmax = 2", "min = 3 is more than max = 2"),
        ("[job]\nmax = 2", "unknown setting 'job'"),
    ],
)
def test_bad_file(text, message, script):
    Path("job.toml").write_text(text)
    assert message in fails("run", "--config", "job.toml", script, code=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HPC_ELASTIC_MAXX", "3", "unknown setting 'maxx' in the environment (HPC_ELASTIC_…); did you mean 'max'?"),
        ("HPC_ELASTIC_MAX", "many", "max"),
        ("HPC_ELASTIC_CONFIG", "absent.toml", "configuration absent.toml: No such file or directory"),
    ],
)
def test_bad_environment(name, value, message, script, monkeypatch):
    monkeypatch.setenv(name, value)
    assert message in fails("run", script, code=2)


@pytest.mark.parametrize("command", ["run", "submit"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["absent.py"], "script absent.py does not exist in "),
        (["script.py/x.py"], "script script.py/x.py does not exist in "),
        (["."], "script . is a folder: name a file in it"),
        (["pipe"], "script pipe is no regular file"),
        (["-m", "no.such.module"], "module no.such.module does not exist in "),
        (["-m", "package.absent"], "module package.absent does not exist in "),
        (["-m", "script.absent"], "module script.absent does not exist in "),
        (["-m", "sys.argv"], "module sys.argv does not exist in "),
        (["-m", "package"], "module package is a package without a module __main__"),
        (["-m", ".script"], "module .script does not exist in "),
        (["-m", "script."], "module script. does not exist in "),
    ],
)
@pytest.mark.usefixtures("script")
def test_no_such_script(command, what, message):
    """It is refused before there is a run directory, and no package is imported for that."""
    os.mkfifo("pipe")
    package()
    assert message in fails(command, *what, code=2)
    assert not Path("runs").exists()


def package():
    """Make a package that can't be imported, with a module that can be run."""
    for folder, name in (("package", "__init__"), ("package", "module"), ("package/space/inner", "module")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.py").write_text("raise AssertionError")


@pytest.mark.parametrize(
    "name", ["script", "package.module", "package.space.inner.module", "hpc_elastic.cli", "json.tool", "this", "unittest"]
)
@pytest.mark.usefixtures("script")
def test_module_is_found_as_python_does(name):
    package()
    invoke("submit", "--dry-run", "-m", name, code=0)


@pytest.mark.usefixtures("script")
def test_module_on_a_relative_path(monkeypatch):
    """It is relative to where the ranks will be started."""
    Path("source").mkdir()
    Path("source/there.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"source{os.pathsep}{ROOT}")
    scripts.check("there", Path.cwd(), module=True)
    with pytest.raises(LaunchError, match="module there does not exist"):
        scripts.check("there", Path("/"), module=True)


@pytest.mark.usefixtures("script")
def test_module_in_a_zip(monkeypatch):
    package()
    with zipfile.ZipFile("app.zip", "w") as archive:
        for file in Path("package").rglob("*.py"):
            archive.write(file)
    shutil.rmtree("package")
    monkeypatch.setenv("PYTHONPATH", f"{Path('app.zip').absolute()}{os.pathsep}{ROOT}")
    scripts.check("package.module", Path.cwd(), module=True)
    with pytest.raises(LaunchError, match=r"module package\.absent does not exist"):
        scripts.check("package.absent", Path.cwd(), module=True)


@pytest.mark.usefixtures("script")
def test_module_of_a_package_that_looks_for_its_modules_itself():
    """Only Python, which imports it, knows where they lie."""
    package()
    Path("package/__init__.py").write_text("__path__.append('elsewhere')")
    invoke("submit", "--dry-run", "-m", "package.absent", code=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, to whom only root can change")
def test_script_that_may_not_be_read(script, tmp_path):
    tmp_path.chmod(0o777)
    Path(script).chmod(0)
    os.seteuid(65534)
    try:
        message = fails("run", script, code=2)
    finally:
        os.seteuid(0)
    assert message == "script script.py can't be read: Permission denied; see to its permissions"
    assert not Path("runs").exists()


def test_no_mpiexec(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fails("run", script, code=2).startswith("no mpiexec found")


@pytest.mark.usefixtures("run")
def test_used_run_directory(script):
    assert "is already used: name another one" in fails("run", "--run-dir", "r", script, code=2)


@pytest.mark.parametrize("place", ["file", "file/r", "/proc/r"])
def test_run_directory_that_cannot_be_made(place, script):
    Path("file").touch()
    assert "can't be made" in fails("run", "--run-dir", place, script, code=2)


def test_run_directory_on_a_full_disk(script, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunDirectory, "put_launch", full)
    message = fails("run", "--run-dir", "r", script, code=2)
    assert message.endswith("r can't be written: No space left on device; make room, or see to its permissions")
    assert not Path("r").exists()


def test_settings_reach_the_supervisor(monkeypatch):
    """The command line wins over the environment, and that over the file; what follows the script is its own."""
    seen = []

    class Spy:
        run = RunDirectory.create(Path("spied"))

        @classmethod
        def start(cls, *arguments, module):
            seen.append((*arguments, module))
            return cls()

        def go(self):
            return 130

    monkeypatch.setattr("hpc_elastic.supervisor.Supervisor", Spy)
    monkeypatch.setenv("HPC_ELASTIC_MAX", "5")
    monkeypatch.setenv("HPC_ELASTIC_SEED", "7")
    Path("job.toml").write_text("max = 6\nseed = 8\nmin = 2\nranks = 2")
    options = ["--config", "job.toml", "--max", "4", "--timetable", "3:2", "--set", "deadline_s=60"]
    _, err = invoke("run", *options, "-m", "a.b", "--max", "9", "-x", code=130)
    assert err == f"run directory {Path('spied').absolute()}\n"
    ((name, arguments, given, module),) = seen
    assert (name, arguments, module) == ("a.b", ["--max", "9", "-x"], True)
    config = build(given)
    assert (config.max_ranks, config.seed, config.min_ranks) == (4, 7, 2)
    assert (config.policy, config.timetable, config.deadline_s) == ("timetable", "3:2", 60.0)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "stop", "report", "tensorboard", "resize", "checkpoint", "resume"])
@pytest.mark.parametrize("place", ["absent", "."])
def test_no_run_directory(name, place):
    more = ["2"] if name == "resize" else []
    assert "is not a run directory; `hpc-elastic run` makes one" in fails(name, place, *more, code=4)


@pytest.mark.parametrize("request_", [("resize", "r", "2"), ("stop", "r"), ("checkpoint", "r")])
@pytest.mark.parametrize("state", ["ended", "stopped", "failed"])
def test_request_to_a_run_that_is_over(request_, state, run):
    run.put_status(now(state))
    assert fails(*request_, code=4) == f"the job in r is not running: it has {state}"
    assert run.requests() == []


@pytest.mark.parametrize("request_", [("resize", "r", "2"), ("stop", "r"), ("checkpoint", "r"), ("status", "r")])
@pytest.mark.usefixtures("run")
def test_run_that_has_not_begun(request_):
    assert "has no status yet: the job has not reached its first step" in fails(*request_, code=4)


def test_run_that_was_killed(run):
    """Nobody could change the status any more."""
    run.put_status(now())
    run.fail(Failure(error="process 4 was killed", traceback="", member=4, rank=-1, host="vm", generation=-1, step=-1))
    assert fails("stop", "r", code=4) == "the job in r is not running: it has failed"
    out, _ = invoke("status", "r", code=0)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((run.path / "failure.json").stat().st_mtime))
    assert out == f"failed at {since}: epoch 1/1, step 3/9, 1 rank\n  process 4 was killed\n"
    out, _ = invoke("status", "r", "--json", code=0)
    assert (json.loads(out)["state"], json.loads(out)["members"]) == ("failed", [])


@pytest.mark.parametrize("state", ["ended", "stopped"])
def test_status_of_a_run_that_is_over(run, state):
    """Its processes are gone, and their numbers may be others' by now."""
    run.put_status(msgspec.structs.replace(now(state), time=0.0))
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(0))
    assert invoke("status", "r", code=0)[0] == f"{state} at {since}: epoch 1/1, step 3/9, 1 rank\n"
    assert json.loads(invoke("status", "r", "--json", code=0)[0])["members"] == []


@pytest.mark.parametrize("name", ["status", "report", "stop"])
def test_damaged_run(name, run):
    (run.path / "status.json").write_text("{}")
    assert "status.json is damaged" in fails(name, "r", code=4)


def test_damaged_events(run):
    run.events.write_text("x\n")
    assert "events.jsonl is damaged, line 1" in fails("report", "r", code=4)


def test_status(run):
    run.put_status(now())
    out, _ = invoke("status", "r", code=0)
    assert out == "running: epoch 1/1, step 3/9, 1 rank\n  rank 0: process 4, pid 77 on n1, slot 2\n"


def checkpointed(step, **others):
    values = {"loop": 0, "path": f"r/{step}", "seconds": 2.0, "bytes": 1000, "standstill_s": 0.1}
    return events.Checkpointed(step=step, **{**values, **others})


def test_status_tells_of_checkpoints_and_restarts(run, monkeypatch):
    run.put_status(now())
    log = events.EventLog(run.events)
    log.write(checkpointed(20, time=0.0))
    monkeypatch.setattr(standing.time, "time", lambda: 40.0)
    for attempt, step in ((2, 23), (3, 31)):
        log.write(events.Restarted(attempt=attempt, step=step, reason="process 4 was killed", wait_s=0.0))
    out, _ = invoke("status", "r", code=0)
    assert out.splitlines()[-2:] == [
        "  last checkpoint: step 20, 40 s ago",
        "  restarts: 2, the last after step 31: process 4 was killed",
    ]
    found = json.loads(invoke("status", "r", "--json", code=0)[0])
    assert (found["step"], found["checkpoint"]["step"], found["checkpoint_error"]) == (3, 20, None)
    assert [restart["step"] for restart in found["restarts"]] == [23, 31]
    log.write(checkpointed(40, error="No space left on device"))
    out, _ = invoke("status", "r", code=0)
    assert "  last checkpoint: step 20, 40 s ago\n  a newer checkpoint failed: No space left on device\n" in out


def test_status_of_a_run_that_is_silent(run, monkeypatch):
    run.put_status(msgspec.structs.replace(now(), time=0.0))
    monkeypatch.setattr(standing.time, "time", lambda: standing.STALE_S + 1)
    out, _ = invoke("status", "r", code=0)
    assert "the last sign of life is 31 s old" in out


@pytest.fixture
def gone():
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "case", ["gone", "number used again", "one lives", "elsewhere", "a moment ago", "supervised", "over"]
)
def test_a_run_that_was_killed_with_all_who_could_say_so(case, run, gone):
    """It has failed, as far as can be known: a process may live elsewhere, and a supervisor still speak."""
    host = "elsewhere" if case == "elsewhere" else leftovers.HOST
    pids = [gone, {"one lives": 1, "number used again": os.getpid()}.get(case, gone)]
    members = tuple(Member(id=number, pid=pid, host=host) for number, pid in enumerate(pids))
    status = now("ended" if case == "over" else "running")
    spoke = time.time() - standing.SILENT_S - 1 if case == "one lives" else 0.0
    run.put_status(msgspec.structs.replace(status, ranks=2, members=members, time=spoke))
    beat = run.beat_file(1)
    beat.touch()
    if case != "a moment ago":
        os.utime(beat, (10.0, 10.0))
    lock = run.lock() if case == "supervised" else None
    _, failure = standing.look(run)
    assert (failure is not None) == (case in ("gone", "number used again"))
    if failure is not None:
        assert (failure.kind, failure.step, failure.time) == ("lost", 3, 10.0)
        out, _ = invoke("status", "r", code=0)
        assert out.startswith("failed at ")
        assert out.endswith(f"  {failure.error}\n")
        assert json.loads(invoke("report", "r", "--json", code=0)[0])["state"] == "failed"
        assert fails("stop", "r", code=4) == "the job in r is not running: it has failed"
    if lock is not None:
        lock.close()


def test_no_answer(run):
    run.put_status(now())
    message = fails("stop", "r", "--timeout", "0", code=6)
    assert message == "no answer within 0 s: the job may be in a long step; the request stands"
    assert [request.kind for _, request in run.requests()] == ["stop"]


def answering(monkeypatch, accepted, text="said so", then=lambda _: None):
    """Answer in the leader's place."""

    def answer(run, _):
        then(run)
        return Answer(accepted=accepted, text=text)

    monkeypatch.setattr(RunDirectory, "answer_to", answer)


def test_refused(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=False)
    assert invoke("resize", "r", "2", code=5) == ("", "refused: said so\n")
    out, _ = invoke("resize", "r", "2", "--json", code=5)
    assert json.loads(out) == {"accepted": False, "text": "said so"}


def test_accepted(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=True)
    assert invoke("resize", "r", "2", code=0) == ("accepted: said so\n", "")


def test_wait_until_too_late(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=True)
    out, err = invoke("resize", "r", "2", "--wait", "--timeout", "0", code=6)
    assert out == "accepted: said so\n"
    assert "not done within 0 s, but still under way" in err


def test_wait_for_a_resize_that_is_given_up(run, monkeypatch):
    """An older refusal of the same size is none of this request's."""
    run.put_status(now())
    log = events.EventLog(run.events)
    log.write(events.Refused(step=1, ranks=2, reason="of old"))
    refused = events.Refused(step=5, ranks=2, reason="a newcomer failed")
    answering(monkeypatch, accepted=True, then=lambda _: log.write(refused))
    _, err = invoke("resize", "r", "2", "--wait", code=5)
    assert err == "hpc-elastic: the resize was given up: a newcomer failed\n"


def test_wait_for_a_resize_of_a_job_that_ends(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=True, then=lambda run: run.put_status(now("ended")))
    _, err = invoke("resize", "r", "2", "--wait", code=4)
    assert err == "hpc-elastic: the job in r has ended before the resize was done\n"


def test_checkpoint(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=True)
    assert invoke("checkpoint", "r", code=0) == ("accepted: said so\n", "")
    assert [request.kind for _, request in run.requests()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("happened", "code"),
    [
        (checkpointed(3), 0),
        (checkpointed(0, loop=1), 0),  # the next loop counts anew
        (checkpointed(2), 6),  # it was being written when this one was asked for
        (checkpointed(4, error="No space left on device"), 1),
    ],
)
def test_wait_for_a_checkpoint(happened, code, run, monkeypatch):
    run.put_status(now())
    log = events.EventLog(run.events)
    log.write(checkpointed(3))  # of before
    answering(monkeypatch, accepted=True, then=lambda _: log.write(happened))
    out, err = invoke("checkpoint", "r", "--wait", "--timeout", "0.2", code=code)
    assert out == "accepted: said so\n"
    assert ("the checkpoint failed: No space left" in err) == (code == 1)


def test_wait_for_a_checkpoint_of_a_job_that_ends(run, monkeypatch):
    run.put_status(now())
    answering(monkeypatch, accepted=True, then=lambda run: run.put_status(now("ended")))
    _, err = invoke("checkpoint", "r", "--wait", code=4)
    assert err == "hpc-elastic: the job in r has ended before the checkpoint was done\n"


def test_live_job(script, tmp_path):
    """The real thing: asked for its status, resized, refused, reported, and stopped."""
    with Job(command("run", "--run-dir", "r", "--slots", 2, "--max", 2, script, 100000), folder=tmp_path) as job:
        until(Path("r/status.json").exists)
        assert invoke("resize", "r", "2", "--wait", code=0)[0] == "accepted: 1 -> 2 ranks\n"
        out, _ = invoke("status", "r", "--json", code=0)
        assert (json.loads(out)["state"], json.loads(out)["ranks"]) == ("running", 2)
        assert "max = 2" in invoke("resize", "r", "3", code=5)[1]
        assert len(json.loads(invoke("report", "r", "--json", code=0)[0])["generations"]) == 2
        assert invoke("stop", "r", "--wait", code=0)[0].startswith("accepted: the job stops at step")
        done = job.wait(clean=False)  # what is left behind is the elastic tests' business
    assert done.code == 0
    assert "stopped" in done.err
    assert "stopped after" in invoke("report", "r", code=0)[0]
    assert invoke("report", "r", "--svg", "r.svg", code=0) == ("", "")
    assert "<svg" in Path("r.svg").read_text()
    assert fails("stop", "r", code=4) == "the job in r is not running: it has stopped"


def test_script_that_never_calls_run(tmp_path):
    Path("idle.py").write_text("x = 1")
    with Job(command("run", "--run-dir", "r", "idle.py"), folder=tmp_path) as job:
        done = job.wait(clean=False)
    assert done.code == 3
    assert done.err.splitlines()[-1] == "hpc_elastic: idle.py ended without calling he.run(train): nothing was run"
    assert not Path("r").exists()


# --- resume: what is refused; test_supervisor.py has the rest -----------------------------------------------------------


def launched(run, **others):
    values = {"script": "script.py", "module": False, "arguments": [], "settings": {"max": 3}, "mpi": "MPI"}
    run.put_launch(Launch(**{**values, "directory": str(Path.cwd()), **others}))
    return run


def test_resume_without_launch(run):
    assert "has no launch.json: only what `hpc-elastic run` started can be resumed" in fails("resume", "r", code=5)
    (run.path / "launch.json").write_text("{")
    assert "launch.json is damaged" in fails("resume", "r", code=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "4"], "ranks = 4 is more than max = 3"),
        (["--min", "4"], "min = 4 is more than max = 3"),
        (["--set", "run_dir=x"], "run_dir: a run is resumed where it is"),
        (["--set", "deadline=3"], "unknown setting 'deadline'"),
        (["--set", "timetable=x"], "timetable"),
    ],
)
def test_resume_with_bad_settings(options, message, run, script):
    launched(run, script=script)
    assert message in fails("resume", "r", *options, code=2)
    assert run.launch().settings == {"max": 3}
    assert run.attempts() == []


def test_resume_of_a_script_that_is_gone(run):
    launched(run)
    assert fails("resume", "r", code=2).startswith(f"script script.py does not exist in {Path.cwd()}")
    launched(run, module=True, directory="/none")
    assert fails("resume", "r", code=2) == "the run's working directory /none does not exist any more"


def test_resume_of_a_run_that_is_over_or_under_way(run, script):
    launched(run, script=script).put_status(now("ended"))
    assert "has ended well: there is nothing to resume" in fails("resume", "r", code=5)
    run.put_status(now("stopped"))
    with run.lock():
        assert "is in use: its supervisor is at work" in fails("resume", "r", code=5)
    assert run.attempts() == []


def test_resume_of_a_run_with_ranks_elsewhere(run, script, monkeypatch):
    """Nothing here can end those."""
    launched(run, script=script).put_status(now())
    run.put_record(RankRecord(member=Member(id=0, pid=1, host="elsewhere"), outcome="member", time=0.0))
    looks = iter([{"0.beat": 1}, {"0.beat": 2}])
    monkeypatch.setattr(launching, "LOOK_S", 0.0)
    monkeypatch.setattr(launching, "beats", lambda _: next(looks))
    assert "still run on elsewhere: end them there first" in fails("resume", "r", code=5)
    assert run.attempts() == []


# --- verify -----------------------------------------------------------------------------------------------------------


def save(folder, *steps):
    store = Store(folder, keep=9)
    for step in steps:
        about = About(loop=0, cursor=Cursor(step=step), names=("w",), settings={}, generation=0, time=time.time() - 60)
        store.write_part(about, 0, b"header", [np.arange(1000.0)], [])
        store.commit(about, [0])
    return store.all()


def test_verify(run):
    first, second = save(run.path / "checkpoints", 20, 40)
    out, _ = invoke("verify", "r", code=0)
    lines = [line.split() for line in out.splitlines() if line.startswith("00-")]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("00-000000020", "20", "good"),
        ("00-000000040", "40", "good"),
    ]
    found = json.loads(invoke("verify", "r", "--json", code=0)[0])
    assert [(row["loop"], row["step"], row["problems"]) for row in found] == [(0, 20, []), (0, 40, [])]
    assert found[0]["path"] == str(first)
    assert found[0]["bytes"] > 8000
    assert time.time() - 70 < found[0]["time"] < time.time()
    (row,) = json.loads(invoke("verify", second, "--json", code=0)[0])
    assert row["step"] == 40


def test_verify_finds_damage(run):
    _, second, third = save(run.path / "checkpoints", 20, 40, 60)
    content = bytearray((second / "part-0.h5").read_bytes())
    content[len(content) // 2] ^= 1
    (second / "part-0.h5").write_bytes(content)
    (third / "manifest.json").unlink()
    out, _ = invoke("verify", "r", code=7)
    lines = [line for line in out.splitlines() if line.startswith("00-")]
    assert [line.rstrip().endswith(" good") for line in lines] == [True, False, False]
    assert "checksum differs" in lines[1]
    found = json.loads(invoke("verify", "r", "--json", code=7)[0])
    assert [bool(row["problems"]) for row in found] == [False, True, True]
    assert found[2]["step"] is None
    invoke("verify", second, code=7)


@pytest.mark.usefixtures("run")
def test_verify_where_there_is_nothing():
    assert fails("verify", "r", code=7) == "r has no checkpoints"
    assert "absent does not exist: name a run directory or a checkpoint" in fails("verify", "absent", code=4)
    Path("empty").mkdir()
    assert "manifest.json is missing" in invoke("verify", "empty", code=7)[0]


@pytest.mark.parametrize("told", [False, True])
def test_verify_looks_where_the_job_keeps_them(told, run, monkeypatch):
    """As it was started or, since the script has settings too, as the job has said. From any directory."""
    save(Path("kept/r"), 20)
    launched(run, settings={} if told else {"checkpoint_dir": "kept"})
    if told:
        settings = {"checkpoint_dir": "kept"}
        events.EventLog(run.events).write(events.Started(script="s", mpi="m", hosts=(), ranks=1, settings=settings))
    monkeypatch.chdir("/")
    (row,) = json.loads(invoke("verify", run.path, "--json", code=0)[0])
    assert row["step"] == 20


# --- data, and the machine --------------------------------------------------------------------------------------------


def test_pack_and_inspect():
    np.savez("digits.npz", x=np.zeros((10, 4, 4), np.uint8), y=np.arange(10) % 2)
    out, err = invoke("pack", "digits.npz", "--out", "shards", "--shards", "2", code=0)
    assert [Path(line).name for line in out.splitlines()] == ["shard-00000-of-00002.h5", "shard-00001-of-00002.h5"]
    assert err == "packing: 10/10\n"
    found = json.loads(invoke("inspect", "shards", "--json", code=0)[0])
    assert (found["samples"], found["labels"]) == (10, {"0": 5, "1": 5})
    assert "10 samples" in invoke("inspect", *out.splitlines(), code=0)[0]
    assert "is already in shards" in fails("pack", "digits.npz", "-o", "shards", code=7)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pack", "absent.npz", "-o", "s"), 7, "absent.npz does not exist"),
        (("pack", "script.py", "-o", "s"), 7, "script.py"),
        (("pack", ".", "-o", "s", "--size", "3"), 2, "--size 3: write HEIGHTxWIDTH"),
        (("pack", ".", "-o", "s", "--size", "0x3"), 2, "--size 0x3: write HEIGHTxWIDTH"),
        (("pack", ".", "-o", "s", "--size", "²x3"), 2, "write HEIGHTxWIDTH"),
        (("inspect", "absent.h5"), 7, "absent.h5 does not exist"),
        (("inspect", "absent/*.h5"), 7, "there are no shards at absent/*.h5"),
        (("inspect", "script.py"), 7, "script.py is not an HDF5 file"),
    ],
)
@pytest.mark.usefixtures("script")
def test_bad_data(arguments, code, message):
    assert message in fails(*arguments, code=code)
    assert not Path("s").exists()


def test_inspect_of_two_kinds():
    write_shard("a.h5", {"image": np.zeros((3, 2))})
    write_shard("b.h5", {"image": np.zeros((3, 4))})
    assert "does not match" in fails("inspect", "a.h5", "b.h5", code=7)


@pytest.mark.parametrize(("good", "needed", "code"), [(True, True, 0), (False, False, 0), (False, True, 1)])
def test_doctor(good, needed, code, monkeypatch):
    check = Check(name="luck", good=good, needed=needed, text="found", advice="more of it")
    monkeypatch.setattr(doctor, "examine", lambda: [check])
    assert "luck" in invoke("doctor", code=code)[0]
    (found,) = json.loads(invoke("doctor", "--json", code=code)[0])
    assert found == {
        "name": "luck",
        "good": good,
        "needed": needed,
        "text": "found",
        "advice": "more of it",
        "facts": {},
    }


@pytest.mark.usefixtures("run")
def test_file_that_may_not_be_read(monkeypatch):
    """The run of another user; the tests' own user may be one who may read everything."""

    def denied(_):
        raise PermissionError(13, "Permission denied", "r/status.json")

    monkeypatch.setattr(RunDirectory, "status", denied)
    assert fails("status", "r", code=4) == "r/status.json may not be read by this user: Permission denied"


def test_reader_that_has_had_enough():
    """As in `hpc-elastic ... | head -0`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    RunDirectory.create(Path("piped")).put_status(now())
    done = subprocess.run(
        [sys.executable, "-m", "hpc_elastic.cli", "status", "piped"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
