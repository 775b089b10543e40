"""What companions print is passed on in whole lines, once."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from hpc_elastic.outputs import Outputs


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=12)), max_size=12))
def test_everything_once_and_in_order(tmp_path_factory, pieces):
    folder, to = tmp_path_factory.mktemp("companions"), io.BytesIO()
    outputs = Outputs(folder, to)
    wanted = dict.fromkeys(range(3), b"")
    for number, piece in pieces:
        with (folder / f"{number}.out").open("ab") as file:
            file.write(piece)
        wanted[number] += piece
        before = to.getvalue()
        outputs.relay()
        new = to.getvalue()[len(before) :]
        assert not new or new.endswith(b"\n")
    for number in range(3):
        (folder / f"{number}.end").touch()
    outputs.finish()
    outputs.relay(all_of_it=True)
    assert sorted(to.getvalue()) == sorted(b"".join(wanted.values()))


def test_what_a_run_printed_before_it_is_resumed(tmp_path):
    (tmp_path / "0.out").write_bytes(b"old\n")
    to = io.BytesIO()
    outputs = Outputs(tmp_path, to)
    with (tmp_path / "0.out").open("ab") as file:
        file.write(b"new\n")
    outputs.relay()
    assert to.getvalue() == b"new\n"


def test_no_companions(tmp_path):
    outputs = Outputs(tmp_path / "none", io.BytesIO())
    outputs.relay()
    outputs.finish()
