"""Shards: HDF5 files read as one set of samples. The only room of the runtime that imports h5py.

A shard's fields are the data sets in its root; all share their first axis, the samples. Contiguous data sets are mapped
where they lie in the file and gathered from there, past HDF5 (`mapped`); others are read by whole chunks (`chunked`), of
which some or all are kept (`kept`).
"""

from .dataset import CACHE_BYTES, ShardSet, open_shards
from .files import Field, Layout, ShardFile
from .writing import write_shard

__all__ = ["CACHE_BYTES", "Field", "Layout", "ShardFile", "ShardSet", "open_shards", "write_shard"]
