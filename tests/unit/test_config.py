"""Settings: where they come from, which source wins, and what is wrong with them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.config import (
    FILE_VARIABLE,
    RUN_VARIABLE,
    SUPERVISED_VARIABLE,
    Config,
    build,
    from_environment,
    from_file,
)
from hpc_elastic.config import names as setting_names
from hpc_elastic.config import settings as changed
from hpc_elastic.errors import ConfigError


def toml(folder, text):
    path = folder / "job.toml"
    path.write_text(text)
    return path


# --- sources --------------------------------------------------------------------------------------------------------------


def test_defaults():
    config = build()
    assert config == Config()
    assert (config.min_ranks, config.max_ranks, config.ranks, config.microbatches) == (1, 0, 1, 16)


def test_later_sources_win(tmp_path):
    path = toml(tmp_path, "max = 12\nseed = 12\nmicrobatches = 12\n")
    script = {"max": 11, "seed": 11, "microbatches": 11, "slots": 11}
    environ = {FILE_VARIABLE: str(path), "HPC_ELASTIC_MAX": "13", "HPC_ELASTIC_SEED": "13"}
    config = build(script, from_environment(environ), {"max": 14})
    assert (config.max_ranks, config.seed, config.microbatches, config.slots) == (14, 13, 12, 11)
    assert build(script, from_environment(environ)) == build(script, from_file(path), {"max": 13, "seed": 13})


def test_what_is_not_given_hides_nothing():
    """Options left out of a command line are None."""
    assert build({"max": 3}, {"max": None, "seed": None}).max_ranks == 3


def test_the_environment_holds_more_than_settings():
    environ = {
        RUN_VARIABLE: "/run",
        SUPERVISED_VARIABLE: "1",
        FILE_VARIABLE: "",
        "PATH": "/bin",
        "hpc_elastic_max": "9",
    }
    assert from_environment(environ) == {}


# --- types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max", "4", 4),
        ("hold", "true", True),
        ("hold", "0", False),
        ("ledger", "1", True),
        ("deadline_s", "2.5", 2.5),
        ("deadline_s", "3", 3.0),
        ("policy", "fixed", "fixed"),
        ("run_dir", "7", "7"),
        ("progress", "off", "off"),
    ],
)
def test_strings_become_what_they_write(name, text, value):
    config = build(from_environment({"HPC_ELASTIC_" + name.upper(): text}))
    got = msgspec.to_builtins(config)[name]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max", "four"),
        ("max", ""),
        ("max", 2.5),
        ("seed", "0x10"),
        ("hold", "perhaps"),
        ("deadline_s", "soon"),
        ("policy", "eager"),
        ("broker", "slurm2"),
        ("progress", "loud"),
        ("run_dir", 7),
        ("timetable", ["20:3"]),
    ],
)
def test_values_of_the_wrong_type(name, value):
    with pytest.raises(ConfigError, match=rf"setting {name} = .*: (expected|there are) "):
        build({name: value})


def test_a_number_for_a_text_in_toml(tmp_path):
    with pytest.raises(ConfigError, match="run_dir"):
        build(from_file(toml(tmp_path, "run_dir = 5\n")))


# --- names ----------------------------------------------------------------------------------------------------------------


def test_unknown_settings_are_named_with_their_source(tmp_path):
    path = toml(tmp_path, "micro_batches = 4\n")
    for read, where in (
        (lambda: build({"micro_batches": 4}), "the settings"),
        (lambda: from_file(path), re.escape(str(path))),
        (lambda: from_environment({"HPC_ELASTIC_MICRO_BATCHES": "4"}), "the environment"),
        (lambda: from_environment({FILE_VARIABLE: str(path)}), re.escape(str(path))),
        (lambda: build({"micro_batches": 4}, from_environment({})), "the settings"),
    ):
        with pytest.raises(ConfigError, match=f"unknown setting 'micro_batches' in {where}.*did you mean 'microbatches'"):
            read()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("polcy", "did you mean 'policy'"),
        ("Seed", "did you mean 'seed'"),
        ("max_ranks", "did you mean 'max'"),
        ("min_ranks", "did you mean 'min'"),
        ("xyz", "there are: min, max, ranks"),
    ],
)
def test_a_hint_stands_beside_an_unknown_name(name, hint):
    with pytest.raises(ConfigError, match=hint):
        build({name: 1})


def test_tables_are_no_settings(tmp_path):
    with pytest.raises(ConfigError, match="unknown setting 'job'"):
        from_file(toml(tmp_path, "[job]\nmax = 3\n"))


def test_settings_and_their_documentation_agree():
    documented = re.findall(r"^([a-z_]+(?:, [a-z_]+)*) : ", inspect.getdoc(Config), flags=re.MULTILINE)
    attributes = [name for line in documented for name in line.split(", ")]
    assert attributes == [field.name for field in msgspec.structs.fields(Config)]
    assert sorted(setting_names()) == sorted({"min_ranks": "min", "max_ranks": "max"}.get(name, name) for name in attributes)


def test_choices_and_their_documentation_agree():
    text = inspect.getdoc(Config)
    for field in msgspec.structs.fields(Config):
        if field.name in ("policy", "broker", "progress"):
            described = re.search(rf"^{field.name} : str\n((?:    .*\n?)+)", text, flags=re.MULTILINE)
            assert described is not None
            for choice in msgspec.inspect.type_info(Config).fields:
                if choice.name == field.name:
                    assert all(f"``{value}``" in described[1] for value in choice.type.values)


# --- files ----------------------------------------------------------------------------------------------------------------


def test_errors_in_a_file(tmp_path):
    with pytest.raises(ConfigError, match=r"job\.toml is not valid TOML.*line 2"):
        from_file(toml(tmp_path, "max = 3\nmin = = 2\n"))
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        from_file(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        from_environment({FILE_VARIABLE: str(tmp_path)})
    (tmp_path / "latin.toml").write_bytes(b'run_dir = "caf\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin\.toml is not valid TOML"):
        from_file(Path(tmp_path / "latin.toml"))


# --- contradictions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min": 0}, "min = 0: must be at least 1"),
        ({"ranks": 0}, "ranks = 0: must be at least 1"),
        ({"microbatches": 0}, "microbatches = 0"),
        ({"cores_per_rank": 0}, "cores_per_rank = 0"),
        ({"max": -1}, "max = -1: must not be negative"),
        ({"slots": -1}, "slots = -1"),
        ({"gpus_per_rank": -1}, "gpus_per_rank = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"deadline_s": 0}, r"deadline_s = 0\.0: must be positive"),
        ({"deadline_s": -1}, r"deadline_s = -1\.0"),
        ({"deadline_s": float("nan")}, "deadline_s = nan"),
        ({"min": 3, "max": 2}, "min = 3 is more than max = 2"),
        ({"ranks": 3, "max": 2}, "ranks = 3 is more than max = 2"),
        ({"ranks": 2, "min": 3}, "ranks = 2 is less than min = 3"),
        ({"policy": "timetable"}, "needs a timetable"),
        ({"timetable": "1:2"}, 'a timetable is given, but policy = "auto"'),
        ({"timetable": "1:2", "policy": "fixed"}, 'policy = "fixed"'),
        ({"broker": "script"}, "needs a supply"),
        ({"broker": "slurm", "arrival": "spawn"}, "leave arrival out"),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(ConfigError, match=message):
        build(given)


@pytest.mark.parametrize(
    "given",
    [
        {"min": 3, "max": 3},
        {"min": 3},
        {"min": 2, "ranks": 1},
        {"max": 0, "ranks": 9},
        {"policy": "timetable", "timetable": "1:2"},
        {"broker": "script", "supply": "0:1"},
        {"deadline_s": float("inf")},
    ],
)
def test_no_contradictions(given):
    build(given)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "min": st.integers(1, 3),
            "max": st.integers(3, 9),
            "seed": st.integers(0, 2**60),
            "hold": st.booleans(),
            "deadline_s": st.floats(0.1, 1e6),
            "run_dir": st.text(max_size=5),
            "progress": st.sampled_from(["auto", "plain", "off"]),
        },
    )
)
def test_what_differs_from_the_defaults_makes_the_same_configuration(given):
    config = build(given)
    assert build(changed(config)) == config
    assert changed(config).items() <= given.items()
    assert build(msgspec.json.decode(msgspec.json.encode(config))) == config
