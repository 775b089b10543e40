"""Arrays on a GPU, with a fake CuPy: what is taken for one, what is pinned, and that copies are waited for."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from hpc_elastic.arrays import gpu, host
from hpc_elastic.comm.segments import Segment
from hpc_elastic.errors import ArrayError, ConfigError, StepError
from hpc_elastic.reduce.form import Form, Pool

from . import fake_cupy


@pytest.fixture
def cupy(monkeypatch):
    return fake_cupy.install(monkeypatch)


class Tensor:
    """One of TensorFlow's, on GPU 0: it refuses to hear of streams."""

    def __init__(self, values):
        self.values = values

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        if stream is not None:
            raise RuntimeError("tf.Tensor does not support DLPack export with a non-None stream")
        return self.values.__dlpack__()


def test_without_a_gpu_cupy_is_not_imported():
    code = """
import sys
import numpy as np
from hpc_elastic.arrays import gpu, host
class Far:
    def __dlpack_device__(self): return 2, 0
    def __array__(self, dtype=None, copy=None): return np.ones(2)
gpu.PRESENT = False
assert gpu.adopted(np.ones(2)) is None and gpu.adopted(Far()) is None and gpu.library() is None
gpu.PRESENT = True
gpu.library.cache_clear()
assert gpu.adopted(np.ones(2)) is None and gpu.adopted(1.0) is None
host.flatten([np.ones(2), 1.0])
assert "cupy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_where_cupy_sees_no_gpu_arrays_are_as_without_it(monkeypatch):
    fake_cupy.install(monkeypatch, devices=0)
    assert gpu.library() is None
    assert gpu.adopted(Tensor(np.ones(2))) is None
    assert gpu.name() == ""
    with pytest.raises(ConfigError, match="no GPU is visible"):
        gpu.empty(8)
    with pytest.raises(ConfigError, match="no GPU is visible"):
        gpu.use(0)


def test_what_lies_on_a_gpu(cupy):
    far = cupy.asarray(np.ones(3))
    assert gpu.adopted(far) is far
    for near in (np.ones(3), 1.0, [1.0], None, np.float32(1)):
        assert gpu.adopted(near) is None
    arrays, structure = host.flatten({"a": far, "b": [np.ones(2), 2.0]})
    assert arrays[0] is far
    assert structure.places() == [host.GPU, host.HOST, host.HOST]
    assert structure != host.flatten({"a": np.ones(3), "b": [np.ones(2), 2.0]})[1]
    built = structure.build(iter("xyz"))
    assert built == {"a": "x", "b": ["y", "z"]}
    assert host.numbers(far) is far


def test_a_tensor_is_taken_over_without_a_copy(cupy):
    values = np.arange(4.0)
    array = gpu.adopted(Tensor(values))
    assert isinstance(array, cupy.ndarray)
    assert np.shares_memory(array.get(), values) is False  # get copies
    values[0] = 9
    assert array.get().tolist() == [9, 1, 2, 3]
    assert ("synchronize device", 0) in fake_cupy.LOG


def test_an_array_is_lent_when_it_has_been_computed(cupy):
    array = np.add(cupy.asarray(np.ones(2)), cupy.asarray(np.ones(2)))
    lent = np.from_dlpack(
        fake_cupy.types.SimpleNamespace(__dlpack__=lambda **_: gpu.lend(array), __dlpack_device__=lambda: (1, 0))
    )
    assert lent.tolist() == [2, 2]


def test_another_gpu_is_refused(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.Device, "count", 2)
    array = cupy.asarray(np.ones(3))
    assert gpu.use(3) == 1
    assert gpu.current() == 1
    with pytest.raises(ArrayError, match=r"is on GPU 0, and this rank computes on GPU 1.*job\.gpu\(\)"):
        gpu.adopted(array)


def test_what_has_no_sum_is_refused(cupy):
    with pytest.raises(StepError, match="can't sum a value of type ndarray"):
        host.flatten(cupy.asarray(np.ones(2, complex)))
    with pytest.raises(ArrayError, match="give an array of numbers"):
        host.numbers(cupy.asarray(np.zeros(2, "M8[s]")))


def test_a_copy_has_come_when_it_was_waited_for(cupy):
    array, target = np.add(cupy.asarray(np.ones(2)), cupy.asarray(np.ones(2))), np.zeros(2)
    gpu.fetch(array, target)
    assert target.tolist() == [0, 0]
    gpu.wait()
    assert target.tolist() == [2, 2]
    there = gpu.to_device(target)
    target[:] = 0
    assert gpu.to_host(there).tolist() == [2, 2]


@pytest.mark.usefixtures("cupy")
def test_memory_is_pinned_once_and_unpinned_before_it_goes():
    segment = Segment()
    segment.grow(3 * gpu.PINNED_BYTES)
    memory = segment.bytes[: gpu.PINNED_BYTES]
    for _ in range(3):
        gpu.pin(memory[:])
    gpu.pin(segment.bytes[:100])  # so little is copied sooner than pinned
    assert fake_cupy.LOG == [("pin", gpu.PINNED_BYTES)]
    address = memory.ctypes.data
    del memory
    gc.collect()
    assert len(fake_cupy.LOG) == 1
    del segment
    gc.collect()
    assert fake_cupy.LOG[1:] == [("unpin", address)]
    assert not gpu._pinned


@pytest.mark.usefixtures("cupy")
def test_slots_of_one_segment_are_pinned_each():
    pool = Pool(Form([((gpu.PINNED_BYTES,), np.dtype(np.float32))], 0))
    slots = [pool.take() for _ in range(3)]
    for slot in slots:
        gpu.pin(slot.memory)
    assert [kind for kind, _ in fake_cupy.LOG] == ["pin"] * 3
    del pool, slots, slot
    gc.collect()
    assert sorted(kind for kind, _ in fake_cupy.LOG) == ["pin"] * 3 + ["unpin"] * 3


@pytest.mark.usefixtures("cupy")
def test_where_memory_can_not_be_pinned_all_goes_on(monkeypatch):
    def refuse(*_):
        raise fake_cupy.CUDARuntimeError

    monkeypatch.setattr(fake_cupy.runtime, "hostRegister", refuse)
    gpu.pin(np.empty(gpu.PINNED_BYTES, np.uint8))
    assert not gpu._pinned


@pytest.mark.tensorflow
def test_results_become_tensors_without_a_copy(cupy):
    from hpc_elastic import keras

    keras.same_bits(threads=1)  # before the first operation, as in the other tests that may run in this process

    import tensorflow as tf

    far, near = np.add(cupy.asarray(np.ones(3)), cupy.asarray(np.ones(3))), np.ones(2)
    tensors = keras.tensors({"far": far, "near": [near]})
    assert tensors["near"] == [near]
    assert isinstance(tensors["far"], tf.Tensor)
    assert tensors["far"].numpy().tolist() == [2, 2, 2]
    assert np.shares_memory(np.from_dlpack(tensors["far"]), far._values)
    assert keras.tensors([near])[0] is near
