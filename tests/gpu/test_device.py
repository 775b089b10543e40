"""What is taken for granted of CuPy, CUDA and NCCL: the bits of sums, copies, pinned memory, and messages."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_elastic import reduce
from hpc_elastic.arrays import gpu, nccl
from hpc_elastic.comm.segments import Segment
from hpc_elastic.errors import ArrayError

from ..unit.test_reduce import FakeWorld, bits, mixed, use

pytestmark = pytest.mark.gpu
DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u4", "?"]


def awkward(dtype, seed):
    """Values of all sizes, among them zeros of both signs, infinities, and what is too small to be normal."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind != "f":
        return rng.integers(0, 100, 10_007).astype(dtype)
    limits = np.finfo(dtype)
    sizes = rng.uniform(np.log2(limits.smallest_subnormal), np.log2(limits.max) - 2, 10_007)
    values = (np.exp2(sizes) * rng.choice([-1, 1], 10_007)).astype(dtype)
    values[:4] = 0.0, -0.0, np.inf, limits.smallest_subnormal
    return values


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_addition_and_one_product_have_the_bits_of_numpy(dtype, cupy):
    left, right = awkward(dtype, 1), awkward(dtype, 2)
    far, out = [cupy.asarray(value) for value in (left, right)], cupy.empty(left.shape, dtype)
    np.add(*far, out=out)
    assert out.get().tobytes() == np.add(left, right).tobytes()
    if np.dtype(dtype).kind == "f":
        weight = np.dtype(dtype).type(0.3)
        np.multiply(far[0], weight, out=out)
        assert out.get().tobytes() == np.multiply(left, weight).tobytes()
    np.copyto(out, far[1])
    assert out.get().tobytes() == right.tobytes()


@pytest.mark.parametrize("small", [0, 1 << 15])
def test_sums_of_ranks_that_share_a_gpu_have_the_bits_of_numpy(small, cupy, monkeypatch):
    monkeypatch.setattr(reduce, "SMALL_BYTES", small)

    def far(step, leaf):
        return {key: cupy.asarray(value) if key in ("w", "b", "none") else value for key, value in mixed(step, leaf).items()}

    def body(values):
        def run(ranks):
            total, found = reduce.Sum(7, lambda: ranks), []
            for step, empty in enumerate([set(), {1, 4}, {0, 1, 2}]):
                tree, metrics = use(total, step, 7, empty, values)
                near = {key: value.get() if isinstance(value, cupy.ndarray) else value for key, value in tree.items()}
                found.append((bits(near), metrics))
            return found

        return run

    (expected,) = FakeWorld(1).run(body(mixed))
    for size in (1, 2, 3):
        assert FakeWorld(size).run(body(far)) == [expected] * size


def test_arrays_on_the_current_gpu_are_taken_over(cupy):
    array = cupy.arange(5)
    assert gpu.adopted(array) is array
    assert gpu.to_host(gpu.to_device(np.arange(5.0))).tolist() == [0, 1, 2, 3, 4]
    assert gpu.name()
    if cupy.cuda.runtime.getDeviceCount() > 1:
        with cupy.cuda.Device(1), pytest.raises(ArrayError, match="is on GPU 0"):
            gpu.adopted(array)


def test_memory_of_a_segment_can_be_pinned(cupy):
    segment = Segment()
    segment.grow(4 * gpu.PINNED_BYTES)
    memory, address = segment.bytes[:], segment.bytes.ctypes.data
    gpu.pin(memory)
    assert address in gpu._pinned
    expected = np.arange(memory.nbytes).astype(np.uint8)
    gpu.fetch(cupy.asarray(expected), memory)
    gpu.wait()
    assert (memory == expected).all()
    del memory, segment
    assert address not in gpu._pinned


@pytest.mark.skipif(not nccl.version(), reason="needs NCCL")
def test_a_line_of_one_rank(cupy):
    line = nccl.connect(nccl.fresh_key(), 1, 0, gpu.current())
    source, target = cupy.arange(1000.0), cupy.zeros(1000)
    line.trade([(0, source)], [(0, target)])
    line.add_up(target)
    finished = gpu.finished()
    gpu.wait()
    assert finished()
    line.check()
    assert (target == source).all()
    line.close()


@pytest.mark.tensorflow
def test_tensors_are_not_copied(cupy):
    import tensorflow as tf

    from hpc_elastic import keras

    if not tf.config.list_physical_devices("GPU"):
        pytest.skip("this TensorFlow sees no GPU")
    tensor = tf.square(tf.range(1000.0))
    array = gpu.adopted(tensor)
    assert isinstance(array, cupy.ndarray)
    assert array.get().tobytes() == tensor.numpy().tobytes()
    back = keras.tensors([array])[0]
    assert "GPU" in back.device
    assert gpu.adopted(back).data.ptr == array.data.ptr
