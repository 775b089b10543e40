"""Events: what is written is read, a line that is still being written is left out."""

from __future__ import annotations

import stat
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_elastic import events
from hpc_elastic.errors import RunDirectoryError
from hpc_elastic.events import AnyEvent, Ended, Epoch, EventLog, Failed, Refused, read

KINDS = typing.get_args(AnyEvent)
VALUES = {
    int: st.integers(-(2**62), 2**62),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=12),
    bool: st.booleans(),
}


def values(hint):
    """A strategy for a field's type."""
    if hint in VALUES:
        return VALUES[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if arguments == (str, typing.Any):
        return st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=3), max_size=3)
    if arguments and arguments[0] is str:  # a mapping of names to numbers
        return st.dictionaries(st.text(max_size=5), VALUES[float], max_size=3)
    raise AssertionError(f"no strategy for {hint}")


def any_event(kind):
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in msgspec.structs.fields(kind)})


def test_the_union_has_every_event():
    defined = [thing for thing in vars(events).values() if isinstance(thing, type) and issubclass(thing, events.Event)]
    assert set(KINDS) == set(defined) - {events.Event}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_as_it_was_written(kind, tmp_path_factory):
    @settings(deadline=None, max_examples=25)
    @given(st.lists(any_event(kind), max_size=3))
    def round_trip(happened):
        path = tmp_path_factory.mktemp("events") / "events.jsonl"
        log = EventLog(path)
        for event in happened:
            log.write(event)
        assert read(path) == happened
        if happened:
            lines = path.read_bytes().split(b"\n")[:-1]
            assert len(lines) == len(happened)
            assert all(msgspec.json.decode(line)["event"] == kind.__name__.lower() for line in lines)

    round_trip()


def test_all_kinds_in_one_file(tmp_path):
    @settings(deadline=None, max_examples=20, database=None)
    @given(st.lists(st.one_of([any_event(kind) for kind in KINDS]), max_size=6))
    def one_file(happened):
        path = tmp_path / "events.jsonl"
        path.unlink(missing_ok=True)
        for event in happened:
            EventLog(path).write(event)  # as leaders do, one after the other
        assert read(path) == happened

    one_file()


def test_a_line_half_written_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    first, second = Refused(step=1, ranks=2, reason="no slots\nat all"), Ended(steps=5, seconds=1.5, ranks=2)
    EventLog(path).write(first)
    size = path.stat().st_size
    EventLog(path).write(second)
    whole = path.read_bytes()
    for cut in range(size, len(whole)):
        path.write_bytes(whole[:cut])
        assert read(path) == [first]
    path.write_bytes(whole)
    assert read(path) == [first, second]


def test_a_reader_reads_each_event_once(tmp_path):
    path = tmp_path / "events.jsonl"
    log, reader = events.EventLog(path), events.Reader(path)
    assert reader.read() == []
    for text in ("one", "two"):
        log.write(events.Notice(text=text))
        assert [event.text for event in reader.read()] == [text]
        assert reader.read() == []
    with path.open("ab") as file:
        file.write(b'{"event":"no')
    assert reader.read() == []
    with path.open("ab") as file:
        file.write(b'thing"}\n')
    with pytest.raises(RunDirectoryError, match="line 3"):
        reader.read()


def test_half_a_line_is_cut_off_before_the_log_is_continued(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.mend()
    assert not path.exists()
    event = Ended(steps=5, seconds=1.5, ranks=2)
    log.write(event)
    log.mend()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:9])
    log.mend()
    assert path.read_bytes() == whole
    log.write(event)
    assert read(path) == [event, event]
    path.write_bytes(whole[:9])
    log.mend()
    assert path.read_bytes() == b""


def test_no_file_has_no_events(tmp_path):
    assert read(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read(tmp_path / "empty.jsonl") == []


def test_one_event_is_one_write(tmp_path, monkeypatch):
    writes = []
    real = events.os.write
    monkeypatch.setattr(events.os, "write", lambda descriptor, data: writes.append(data) or real(descriptor, data))
    EventLog(tmp_path / "events.jsonl").write(Refused(step=1, ranks=2, reason="x" * 10_000))
    assert len(writes) == 1
    assert writes[0].endswith(b"\n")
    assert stat.S_IMODE((tmp_path / "events.jsonl").stat().st_mode) == 0o600


def test_the_time_is_that_of_the_writing():
    before = events.time.time()
    event = Ended(steps=1, seconds=1.0, ranks=1)
    assert before <= event.time <= events.time.time()


def test_damage_is_said_with_its_line(tmp_path):
    path = tmp_path / "events.jsonl"
    for damage in (b"{", b'{"event": "party"}', b'{"event": "ended", "time": 1}', b'{"event": "\xff"}', b""):
        path.unlink(missing_ok=True)
        EventLog(path).write(Ended(steps=1, seconds=1.0, ranks=1))
        with path.open("ab") as file:
            file.write(damage + b"\n")
        with pytest.raises(RunDirectoryError, match=r"events\.jsonl is damaged, line 2"):
            read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_breaks_nothing(tmp_path, value):
    """JSON has neither NaN nor infinity; an epoch of a job that diverges must not make the whole file unreadable."""
    path = tmp_path / "events.jsonl"
    EventLog(path).write(Epoch(epoch=0, step=9, ranks=2, samples=60, seconds=1.5, metrics={"loss": value, "accuracy": 0.5}))
    EventLog(path).write(Failed(error="diverged", rank=0, host="node", generation=0, step=9))
    epoch, failed = read(path)
    assert isinstance(epoch, Epoch)
    assert epoch.metrics["accuracy"] == 0.5
    assert epoch.metrics["loss"] != epoch.metrics["loss"]
    assert isinstance(failed, Failed)
