"""A fake CuPy, for hosts without a GPU: its arrays are NumPy's, in a class that np.asarray refuses, as CuPy's.

What goes to a stream is done only when somebody waits for the stream, so that code which does not wait gets wrong values;
`LOG` has what was done, in order. Its NCCL connects threads of one process. What it says of CuPy follows CuPy 13's
source; it proves nothing about a device.
"""

from __future__ import annotations

import functools
import os
import queue
import sys
import threading
import types
from typing import ClassVar

import numpy as np

from hpc_elastic.arrays import gpu

LIMIT_S = 20
LOG = []  # ("fetch", nbytes), ("put", nbytes), ("wait", stream), ("pin", nbytes), ("unpin", address) …
_local = threading.local()  # each rank of a test is a thread, with a current device and a stream of its own


class ndarray:  # noqa: N801  (CuPy's name)
    """An array on a GPU."""

    def __init__(self, values, number=None):
        self._values = values
        self.device = Device(_number() if number is None else number)

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    size = property(lambda self: self._values.size)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    data = property(lambda self: types.SimpleNamespace(ptr=self))  # what an address is here

    def __len__(self):
        return len(self._values)

    def __getitem__(self, place):
        return ndarray(self._values[place], self.device.id)

    def view(self, dtype=None):
        return ndarray(self._values.view(*(() if dtype is None else (dtype,))), self.device.id)

    def reshape(self, *shape):
        return ndarray(self._values.reshape(*shape), self.device.id)

    def copy(self):
        copy = ndarray(np.empty_like(self._values), self.device.id)
        get_current_stream().run(lambda: np.copyto(copy._values, self._values))
        return copy

    def fill(self, value):
        get_current_stream().run(lambda: self._values.fill(value))

    def get(self, stream=None, order="C", out=None, blocking=True):
        assert order == "C"
        stream = stream or get_current_stream()
        out = np.empty_like(self._values) if out is None else out
        assert out.dtype == self.dtype
        assert out.shape == self.shape
        LOG.append(("fetch", out.nbytes))
        stream.run(lambda: np.copyto(out, self._values))
        if blocking:
            stream.synchronize()
        return out

    def set(self, array, stream=None):
        assert isinstance(array, np.ndarray)
        assert array.dtype == self.dtype
        assert array.shape == self.shape
        LOG.append(("put", array.nbytes))
        (stream or get_current_stream()).run(lambda: np.copyto(self._values, array))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None):
        assert method == "__call__"
        for one in (*inputs, *(out or ())):
            if isinstance(one, np.ndarray):
                raise TypeError(f"Unsupported type {type(one)}")
        shape = np.broadcast_shapes(*(one.shape for one in inputs))
        target = out[0] if out else ndarray(np.empty(shape, np.result_type(*(one.dtype for one in inputs))))
        values = [one._values if isinstance(one, ndarray) else one for one in inputs]
        get_current_stream().run(lambda: ufunc(*values, out=target._values))
        return target

    def __array_function__(self, function, kinds, args, kwargs):
        if function is np.copyto:
            target, source = args
            if not isinstance(target, ndarray) or not isinstance(source, ndarray):
                raise TypeError("neither NumPy nor CuPy copies between host and GPU here")
            get_current_stream().run(lambda: np.copyto(target._values, source._values))
            return None
        if function is np.empty_like:
            return ndarray(np.empty_like(args[0]._values))
        return NotImplemented

    def __dlpack_device__(self):
        return 2, self.device.id

    def __dlpack__(self, **_):
        return self._values.__dlpack__()


def empty(shape, dtype=np.float64):
    """Return an array full of rubbish, so that what is read before it is written shows."""
    values = np.empty(shape, dtype)
    values.reshape(-1).view(np.uint8).fill(0xA5)
    return ndarray(values)


def asarray(values):
    """Return a copy of NumPy's `values`, on the current GPU."""
    return ndarray(np.array(values))


def from_dlpack(value):
    assert value.__dlpack_device__()[0] == 2
    get_current_stream().synchronize()
    capsule = value.__dlpack__(stream=1)
    host = types.SimpleNamespace(__dlpack__=lambda **_: capsule, __dlpack_device__=lambda: (1, 0))
    return ndarray(np.from_dlpack(host), value.__dlpack_device__()[1])


# --- cupy.cuda --------------------------------------------------------------------------------------------------------


def _number():
    return getattr(_local, "device", 0)


class Device:
    count = 1

    def __init__(self, number=None):
        self.id = _number() if number is None else number

    @property
    def pci_bus_id(self):
        return f"0000:{self.id:02x}:00.0"

    def use(self):
        _local.device = self.id

    def synchronize(self):
        LOG.append(("synchronize device", self.id))

    def __enter__(self):
        self._before, _local.device = _number(), self.id

    def __exit__(self, *_):
        _local.device = self._before


class Stream:
    """Does nothing until somebody waits, or asks whether it has been done."""

    def __init__(self, *, non_blocking=False):
        self.name = "own" if non_blocking else "current"
        self._todo = []
        self.ptr = self

    def run(self, action):
        self._todo.append(action)

    def synchronize(self):
        LOG.append(("wait", self.name))
        self.drain()

    def drain(self):
        while self._todo:
            self._todo.pop(0)()

    def record(self):
        return Event(self)

    def __enter__(self):
        self._outer, _local.stream = get_current_stream(), self
        return self

    def __exit__(self, *_):
        _local.stream = self._outer


class Event:
    def __init__(self, stream):
        self._stream = stream

    @property
    def done(self):
        self._stream.drain()
        return True


def get_current_stream():
    if not hasattr(_local, "stream"):
        _local.stream = Stream()
    return _local.stream


class CUDARuntimeError(RuntimeError):
    pass


def _host_register(_address, nbytes, flags):
    assert flags == 0
    LOG.append(("pin", nbytes))


def _host_unregister(address):
    LOG.append(("unpin", address))


# --- cupy.cuda.nccl: threads of this process --------------------------------------------------------------------------


class NcclError(RuntimeError):
    pass


class NcclCommunicator:
    """Messages wait in queues; a receipt is work of the stream's, as with NCCL's. A group begins together."""

    _mail: ClassVar = {}
    _lock = threading.Lock()
    fails = ()  # ranks on which a communicator can't be made
    made: ClassVar = []

    def __init__(self, size, key, rank):
        assert len(key) == 128
        assert all(-128 <= one < 128 for one in key)
        if rank in self.fails:
            raise NcclError("unhandled system error")
        self.size, self.rank, self.key, self.aborted = size, rank, key, False
        self.device = _number()
        self.sent = []  # (receiver, nbytes)
        NcclCommunicator.made.append(self)

    def _queue(self, source, target):
        with self._lock:
            return self._mail.setdefault((self.key, source, target), queue.SimpleQueue())

    def send(self, array, nbytes, kind, peer, stream):
        assert _local.grouped
        assert kind == "uint8"
        assert nbytes == array.nbytes
        assert not self.aborted
        self.sent.append((peer, nbytes))
        box = self._queue(self.rank, peer)
        stream.run(lambda: box.put(array._values.tobytes()))

    def recv(self, array, nbytes, kind, peer, stream):
        assert _local.grouped
        assert kind == "uint8"
        assert nbytes == array.nbytes
        box = self._queue(peer, self.rank)

        def take():
            data = box.get(timeout=LIMIT_S)
            assert len(data) == nbytes
            array._values[...] = np.frombuffer(data, array.dtype).reshape(array.shape)

        stream.run(take)

    def allReduce(self, source, target, count, kind, operation, stream):  # noqa: N802  (CuPy's name)
        assert source.size == count
        assert kind == source.dtype.name
        assert operation == "sum"
        others = [other for other in range(self.size) if other != self.rank]

        def add():
            for other in others:
                self._queue(self.rank, other).put(source._values.copy())
            total = source._values.copy()
            for other in others:
                total += self._queue(other, self.rank).get(timeout=LIMIT_S)
            target._values[...] = total

        stream.run(add)

    def check_async_error(self):
        assert not self.aborted

    def abort(self):
        self.aborted = True


def _group(begins):
    def call():
        _local.grouped = begins

    return call


def _key():
    return tuple(np.frombuffer(os.urandom(128), np.int8).tolist())


NCCL_TYPES = ["int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]
nccl = types.SimpleNamespace(
    available=True,
    NcclError=NcclError,
    NcclCommunicator=NcclCommunicator,
    get_version=lambda: 22203,
    get_unique_id=_key,
    groupStart=_group(True),
    groupEnd=_group(False),
    NCCL_SUM="sum",
    **{f"NCCL_{name.upper()}": name for name in NCCL_TYPES},
)
runtime = types.SimpleNamespace(
    getDeviceCount=lambda: Device.count,
    CUDARuntimeError=CUDARuntimeError,
    hostRegister=_host_register,
    hostUnregister=_host_unregister,
)


def install(monkeypatch, *, devices=1, with_nccl=False):
    """Let `arrays.gpu` find this instead of CuPy, on a host that has so many GPUs."""
    module = types.ModuleType("cupy")
    vars(module).update(ndarray=ndarray, empty=empty, asarray=asarray, from_dlpack=from_dlpack, uint8=np.uint8)
    cuda = types.SimpleNamespace(
        is_available=lambda: devices > 0,
        Device=Device,
        Stream=Stream,
        get_current_stream=get_current_stream,
        runtime=runtime,
        nccl=types.SimpleNamespace(**{**vars(nccl), "available": with_nccl}),
    )
    module.cuda = cuda
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(gpu, "PRESENT", True)
    monkeypatch.setattr(gpu, "library", functools.cache(gpu.library.__wrapped__))
    monkeypatch.setattr(Device, "count", devices)
    monkeypatch.setattr(NcclCommunicator, "fails", ())
    LOG.clear()
    NcclCommunicator.made.clear()
    _local.__dict__.clear()
    return module
