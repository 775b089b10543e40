"""The documentation: links resolve, tables agree with the code, and examples run as they stand."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec
import pytest
import typer

import hpc_elastic as he
from benchmarks.applications import CASES
from hpc_elastic import cli, config, errors, events, rundir
from tests.launch import ROOT, Job, hpc_elastic, mpiexec, python, until

DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "slurm" / "README.md"])
IDS = [str(path.relative_to(ROOT)) for path in DOCS]
RUNNABLE = ("README.md", "docs/tutorial.md", "docs/keras.md")
LIMIT_S = 180  # for each command: several ranks import TensorFlow, beside other tests
OF_KERAS = "docs/keras.md"  # needs TensorFlow, which is there with MPICH only
PROGRAM = typer.main.get_command(cli.app)
MARK = re.compile(r"<!--\s*(.*?)\s*-->")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
# Options of other programs that the documentation names.
OTHERS = {"--help", "--version", "--check", "--json", "--png"}
OF_SLURM = {"--nodes", "--exclusive", "--signal", "--requeue", "--partition"}  # sbatch's
OF_THE_CLUSTER = {"--nodes", "--cpus", "--isolate", "--accounting", "--grace", "--extra"}  # slurm/hpc-elastic-cluster's


class Block(NamedTuple):
    """A fenced code block: its language, its text, the comment before it, and the line where it begins."""

    language: str
    text: str
    mark: str
    line: int

    @property
    def commands(self):
        return [line[2:].strip() for line in self.text.splitlines() if line.startswith("$ ")]


def blocks(path):
    """Return the code blocks in the Markdown file `path`."""
    found, mark, lines = [], "", path.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number].strip()
        if line.startswith("```"):
            indent = len(lines[number]) - len(lines[number].lstrip())
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(part[indent:] for part in lines[number + 1 : end]) + "\n"
            found.append(Block(line[3:], text, mark, number + 1))
            number, mark = end, ""
        elif line:
            match = MARK.fullmatch(line)
            mark = match[1] if match else ""
        number += 1
    return found


def prose(path):
    """Return the text of `path` without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def table(mark, path="docs/reference.md"):
    """Return the cells of the table behind the comment `mark`, without its head."""
    lines = (ROOT / path).read_text().splitlines()
    begin = lines.index(f"<!-- {mark} -->")
    rows = []
    for line in lines[begin + 1 :]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def code(text):
    """Return what stands between backticks in `text`."""
    return re.findall(r"`([^`]+)`", text)


def words(command):
    """Return the words of a shell command, without the variables set before it; and these."""
    parts = shlex.split(command)
    first = next(i for i, part in enumerate(parts) if "=" not in part)
    return parts[first:], dict(part.split("=", 1) for part in parts[:first])


# --- links ------------------------------------------------------------------------------------------------------------


def anchor(heading):
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_links_resolve(path):
    for link in LINK.findall(prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, part = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if part:
            headings = re.findall(r"^#+ (.*)$", prose(target), flags=re.MULTILINE)
            assert part in map(anchor, headings), f"{path.name}: {link}"


def test_every_page_is_linked():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    assert {path for path in DOCS if path.parent.name == "docs"} <= linked


# --- names ------------------------------------------------------------------------------------------------------------


def option_names(command):
    return {
        name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")
    }


def all_options():
    return set().union(*(option_names(command) for command in PROGRAM.commands.values()))


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_options_exist(path):
    spans = {span.split()[0].partition("=")[0] for span in code(prose(path)) if span.startswith("--")}
    others = {"slurm.md": OF_SLURM, "slurm-cluster.md": OF_THE_CLUSTER}.get(path.name, set())
    assert spans <= all_options() | OTHERS | others


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_variables_exist(path):
    known = {config.PREFIX + name.upper() for name in config.names()} | config.NOT_SETTINGS
    assert {name for name in re.findall(r"HPC_ELASTIC_\w*", path.read_text()) if name != config.PREFIX} <= known


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_command_lines_parse(path):
    """Each line with hpc-elastic has options that exist, and settings that make sense."""
    lines = [command for block in blocks(path) if block.language == "console" for command in block.commands]
    spans = [span for span in code(prose(path)) if re.match(r"hpc-elastic [a-z]", span) and not re.search(r"[A-Z…]", span)]
    assert {span.split()[1] for span in spans} <= PROGRAM.commands.keys()
    for line in [*lines, *(span for span in spans if len(span.split()) > 2)]:
        parts, _ = words(line)
        if Path(parts[0]).name == "hpc-elastic":
            parse(parts[1:])


def parse(arguments):
    name, *rest = arguments
    command = PROGRAM.commands[name]
    context = command.make_context(name, list(rest))
    if name == "run":
        given = dict(item.split("=", 1) for item in context.params["setting"] or ())
        names = {"minimum": "min", "maximum": "max", **{n: n for n in config.names() if n not in ("min", "max")}}
        settings = {names[key]: value for key, value in context.params.items() if key in names and value is not None}
        if "timetable" in settings:
            settings["policy"] = "timetable"
        config.build(given, settings)
    return context


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_toml_is_valid(path):
    for block in blocks(path):
        if block.language == "toml":
            config.build(tomllib.loads(block.text))


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_python_compiles(path):
    for block in blocks(path):
        if block.language == "python":
            compile(block.text, f"{path}:{block.line}", "exec")


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_marks_are_known(path):
    for block in blocks(path):
        if block.mark.startswith(("run", "file")):
            assert re.fullmatch(r"run( same| background| code=\d+)?|file: \S+", block.mark), f"{path.name}:{block.line}"
            assert block.language == ("python" if block.mark.startswith("file") else "console")
            assert str(path.relative_to(ROOT)) in RUNNABLE, f"{path.name}:{block.line} would not be run"


# --- the reference ----------------------------------------------------------------------------------------------------


def test_settings_table():
    found = {code(name)[0]: code(default)[0] for name, default, _ in table("settings")}
    expected = {field.encode_name: json.dumps(field.default) for field in msgspec.structs.fields(config.Config)}
    assert found == expected


def test_commands_table():
    found = {}
    for command, arguments in table("commands"):
        found[code(command)[0]] = set(code(arguments))
    for name, command in PROGRAM.commands.items():
        metavars = {p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"}
        assert found.pop(name) == option_names(command) | metavars
    assert not found


def test_exit_codes_table():
    found = {int(number) for number, *_ in table("codes")}
    assert found == set(map(int, re.findall(r"(?:^|[\s,])(\d+) [a-z]", PROGRAM.epilog)))


def test_events_table():
    found = {code(event)[0]: code(fields) for event, fields, _ in table("events")}
    expected = {}
    for kind in get_args(events.AnyEvent):
        names = [field.encode_name for field in msgspec.structs.fields(kind) if field.encode_name != "time"]
        expected[kind.__struct_config__.tag] = names
    assert found == expected


def test_run_directory_table():
    found = {code(file)[0] for file, _ in table("rundir")}
    drawn = re.findall(r"^ {4}(\S+) ", inspect.cleandoc(rundir.__doc__), flags=re.MULTILINE)
    assert found == set(drawn)


def test_error_tree():
    (block,) = [block for block in blocks(ROOT / "docs" / "reference.md") if block.mark == "errors"]
    drawn = [line.strip() for line in errors.__doc__.splitlines()]
    tree = [line.strip() for line in block.text.splitlines()]
    begin = drawn.index(tree[0])
    assert drawn[begin : begin + len(tree)] == tree


def test_api_table():
    names = {name.partition("(")[0] for row in table("api") for name in code(row[0])}
    assert names == {f"he.{name}" for name in he.__all__}


def test_job_members():
    assert (
        "`where`, `here`, `begin_again`, `begins_at`, `end`, `close` and `abandon` are the runtime's"
        in (ROOT / "docs" / "reference.md").read_text()
    )
    found = {name.partition("(")[0] for row in table("members: Job") for name in code(row[0])}
    public = {name for name in vars(he.Job) if not name.startswith("_")} | {"stopped"}
    assert found == public - {"where", "here", "begin_again", "begins_at", "end", "close", "abandon"}


def test_members_of_the_others():
    owners = {"step": he.Step, "micro": he.Microbatch, "array": he.DistributedArray}
    for row in table("members: Step Microbatch DistributedArray"):
        for span in code(row[0]):
            match = re.match(r"(\w+)\.(\w+)", span)
            if match:
                owner = owners[match[1]]
                assert hasattr(owner, match[2]) or f"{match[2]}" in (owner.__doc__ or ""), span


def test_layers():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    section = parser["importlinter:contract:layers"]
    (block,) = [block for block in blocks(ROOT / "docs" / "design.md") if block.mark == "layers"]
    assert block.text.split("\n") == [*section["layers"].replace("hpc_elastic.", "").strip().split("\n"), ""]


# --- examples are run -------------------------------------------------------------------------------------------------


def command_line(parts):
    """Return `parts` with the programs of this environment."""
    name, *rest = parts
    if name == "hpc-elastic":
        return hpc_elastic(*rest)
    if name in ("mpirun", "mpiexec"):
        assert rest[0] == "-n"
        assert rest[2] == "python"
        return [*mpiexec(int(rest[1])), *rest[3:]]
    assert name == "python"
    return [*python(), *rest]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("jobs-*.md")), ids=lambda path: path.name)
def test_pages_of_jobs_show_what_the_benchmark_runs(path):
    """`benchmarks.applications` runs these; here it is seen to that the commands are the same."""
    cases = {(case.module, case.options): case for case in CASES}
    shown = set()
    for command in (command for block in blocks(path) if block.language == "console" for command in block.commands):
        before, _, after = command.partition(" -m jobs.")
        if after and not after.split()[0].endswith(".prepare"):
            module, *options = f"jobs.{after}".split()
            case = cases[module, tuple(options)]
            shown.add(module)
            assert before == "python" or f"--timetable {case.timetable}" in before
    assert all((path.parent / picture).exists() for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose(path)))
    assert shown == {case.module for case in CASES if path.stem == f"jobs-{case.job}"}


@pytest.mark.parametrize("name", RUNNABLE)
def test_examples_run(name, tmp_path, monkeypatch):
    """All blocks of a page that are marked, in their order, in one folder."""
    if name == OF_KERAS and importlib.util.find_spec("tensorflow") is None:
        pytest.skip("make setup installs TensorFlow with MPICH only")
    for variable in os.environ:
        if variable.startswith(config.PREFIX):
            monkeypatch.delenv(variable)
    with contextlib.ExitStack() as stack:  # ends what runs in the background, should something fail
        background = []
        for block in blocks(ROOT / name):
            if block.mark.startswith("file: "):
                (tmp_path / block.mark.removeprefix("file: ")).write_text(block.text)
            elif block.mark == "run background":
                background.append(stack.enter_context(begin(block, tmp_path)))
            elif block.mark.startswith("run"):
                print(f"{name}:{block.line}")
                check(block, tmp_path)
        for job in background:
            assert job.wait().code == 0


def begin(block, folder):
    """Start the command of `block`, a job with a named run directory, and return it when it steps."""
    (command,) = block.commands
    parts, environ = words(command)
    status = folder / parts[parts.index("--run-dir") + 1] / "status.json"
    job = Job(command_line(parts), folder=folder, limit_s=LIMIT_S, environ=environ)
    until(lambda: status.exists() and b'"running"' in status.read_bytes())
    return job


def check(block, folder):
    """Run the commands of `block`."""
    wanted = re.search(r"code=(\d+)", block.mark)
    digests = []
    for command in block.commands:
        parts, environ = words(command)
        with Job(command_line(parts), folder=folder, limit_s=LIMIT_S, environ=environ) as job:
            done = job.wait(clean=False)
        assert done.code == (int(wanted[1]) if wanted else 0), f"$ {command}\n{done.out}\n{done.err}"
        print(f"$ {command}\n{done.out}")
        digests += re.findall(r"^sha256\s+([0-9a-f]{64})", done.out, flags=re.MULTILINE)
    if "same" in block.mark:
        assert len(digests) > 1
        assert len(set(digests)) == 1, digests


@pytest.mark.parametrize("path", DOCS, ids=IDS)
def test_nothing_private(path):
    """Nothing of the machines that this was written on."""
    assert not re.search(r"/work|/tmp/|\.\./shared", path.read_text())
