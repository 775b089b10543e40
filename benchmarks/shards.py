"""Reading shards against what else reads images: random batches from a page cache that is warm.

    python -m benchmarks.shards --json [--rounds 7] [--image 28 224]

`ratio_vs_npload` is the rate of `ShardSet.gather`, into arrays that are used again, over that of an index of random numbers
into ``np.load(mmap_mode="r")``; both read images and labels, in batches of 128 of 28x28 or of 32 of 224x224x3.
`ratio_vs_tfrecord` is over that of ``tf.data``: a TFRecord file, shuffled, parsed, and batched. `ratio_vs_decompress` is the
rate at which compressed chunks of 256 (16) images are gathered in the windows of an epoch's order, each once, over that of
one core that does nothing but decompress them. `scaling_vs_memcpy` is what two processes read together over what one reads,
divided by the same of a plain copy of as many bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import h5py
import numpy as np

from hpc_elastic.sampler import Order
from hpc_elastic.shards import open_shards, write_shard

from .record import Record, cannot, record, show

SHAPES = {"28": (28, 28), "224": (224, 224, 3)}
SAMPLES = {"28": 60_000, "224": 3_000}
BATCH = {"28": 128, "224": 32}
OF_TFRECORD = {"28": 50.0, "224": 8.0}
CHUNK = {"28": 256, "224": 16}
Epoch = Callable[[np.ndarray], None]


def images(side: str, random: np.random.Generator) -> np.ndarray:
    """Return images that compress about as pictures do: something in the middle of a dark ground."""
    found = np.zeros((SAMPLES[side], *SHAPES[side]), np.uint8)
    length = SHAPES[side][0]
    middle = slice(length // 5, length - length // 5)
    found[:, middle, middle] = random.integers(0, 128, found[:, middle, middle].shape, np.uint8)
    return found


def rates(kinds: dict[str, Epoch], orders: Callable[[], np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that an epoch of each kind took, in turns; the first turn does not count."""
    took: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        order = orders()
        for name, epoch in kinds.items():
            begun = time.perf_counter()
            epoch(order)
            if number:
                took[name].append(time.perf_counter() - begun)
    return took


def batches(order: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Cut an order into batches."""
    return (order[start : start + length] for start in range(0, len(order) - length + 1, length))


def contiguous_seconds(side: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of epochs over contiguous shards, over npy files, and of copying as much."""
    random = np.random.default_rng(0)
    image, label = images(side, random), random.integers(0, 10, SAMPLES[side])
    write_shard(folder / "a.h5", {"image": image, "label": label})
    np.save(folder / "image.npy", image)
    np.save(folder / "label.npy", label)
    mapped = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "label")]
    length = BATCH[side]
    source, copied = image[:length].reshape(-1), np.empty(length * image[0].size, np.uint8)
    with open_shards(folder / "a.h5") as shards:
        out = {name: np.empty((length, *field.shape), field.dtype) for name, field in shards.fields.items()}

        def ours(order: np.ndarray) -> None:
            for batch in batches(order, length):
                shards.gather(batch, out)

        def npload(order: np.ndarray) -> None:
            for batch in batches(order, length):
                for array in mapped:
                    array[batch]

        def memcpy(order: np.ndarray) -> None:
            whole = image.reshape(-1)
            for start in range(0, len(order) // length * len(source), len(source)):
                copied[:] = whole[start : start + len(source)]

        return rates({"ours": ours, "npload": npload, "memcpy": memcpy}, lambda: random.permutation(len(image)), rounds)


def against_files(side: str, folder: Path, rounds: int) -> Iterator[Record]:
    """Yield the records of contiguous shards."""
    took = contiguous_seconds(side, folder, rounds)
    context = {"image": side, "batch": BATCH[side]}
    yield record("ratio_vs_npload", ratios(took["npload"], took["ours"]), "x", context, 0.9, "higher")
    yield record("ratio_vs_memcpy", ratios(took["memcpy"], took["ours"]), "x", context, None, "higher")
    yield record("images_per_s", [SAMPLES[side] / one for one in took["ours"]], "/s", context, None, "higher")
    mine = statistics.median(took["ours"])
    theirs = tfrecord_seconds(folder, side, max(3, rounds // 2))
    yield record("ratio_vs_tfrecord", [one / mine for one in theirs], "x", context, OF_TFRECORD[side], "higher")
    yield record("scaling_vs_memcpy", scaling(side, folder, rounds), "x", context, 0.9, "higher")


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Return how many times as fast ours was, in each round."""
    return [one / other for one, other in zip(theirs, ours, strict=True)]


def scaling(side: str, folder: Path, rounds: int) -> list[float]:
    """Return what a second process adds when it reads, over what it adds when it copies as much from where images lie."""
    context = multiprocessing.get_context("fork")
    length = BATCH[side]
    order = np.random.default_rng(1).permutation(SAMPLES[side])
    with open_shards(folder / "a.h5") as shards:
        out = {name: np.empty((length, *field.shape), field.dtype) for name, field in shards.fields.items()}
        image = np.load(folder / "image.npy", mmap_mode="r").reshape(-1)

        def ours() -> None:
            for batch in batches(order, length):
                shards.gather(batch, out)

        def memcpy() -> None:
            nbytes = out["image"].size
            for start in range(0, len(order) // length * nbytes, nbytes):
                out["image"].reshape(-1)[:] = image[start : start + nbytes]

        found = []
        for _ in range(rounds):
            gain = []
            for kind in (ours, memcpy):
                seconds = []
                for processes in (1, 2):
                    barrier, queue = context.Barrier(processes), context.Queue()
                    each = [context.Process(target=_timed, args=(kind, barrier, queue)) for _ in range(processes)]
                    for process in each:
                        process.start()
                    seconds.append(max(queue.get(timeout=60) for _ in each))
                    for process in each:
                        process.join(60)
                gain.append(seconds[0] / seconds[1])
            found.append(gain[0] / gain[1])
    return found


def _timed(kind: Callable[[], None], barrier: Barrier, queue: multiprocessing.Queue[float]) -> None:
    kind()
    barrier.wait(60)
    begun = time.perf_counter()
    kind()
    queue.put(time.perf_counter() - begun)


# --- peers ------------------------------------------------------------------------------------------------------------


def tfrecords(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    """Write a TFRecord file as TensorFlow's guide does."""
    import tensorflow as tf

    def feature(data: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

    def whole(value: int) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for one, what in zip(image, label, strict=True):
            features = tf.train.Features(feature={"image": feature(one.tobytes()), "label": whole(int(what))})
            writer.write(tf.train.Example(features=features).SerializeToString())


def tfrecord_seconds(folder: Path, side: str, rounds: int) -> list[float]:
    """Return the seconds of epochs over a TFRecord file of the same images, shuffled in a buffer."""
    import tensorflow as tf

    path = folder / "a.tfrecord"
    tfrecords(path, *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("image", "label")))
    spec = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}

    def parse(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        found = tf.io.parse_single_example(data, spec)
        return tf.reshape(tf.io.decode_raw(found["image"], tf.uint8), SHAPES[side]), found["label"]

    data = tf.data.TFRecordDataset(str(path)).shuffle(min(10_000, SAMPLES[side] // 2), seed=0)
    data = data.map(parse, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH[side]).prefetch(tf.data.AUTOTUNE)
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _batch in data:
            pass
        found.append(time.perf_counter() - begun)
    return found


def chunked_seconds(side: str, folder: Path, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of epochs over compressed shards, and of decompressing alone; and how far they are compressed."""
    import hdf5plugin
    import zstandard

    random = np.random.default_rng(0)
    image, chunk, length = images(side, random), CHUNK[side], BATCH[side]
    nbytes = image[0].size
    path = folder / "zstd.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("image", data=image, chunks=(chunk, *image.shape[1:]), **hdf5plugin.Zstd())
        starts = [(start, *(0,) * (image.ndim - 1)) for start in range(0, len(image), chunk)]
        stored = [data.id.read_direct_chunk(start)[1] for start in starts]
    decompressor = zstandard.ZstdDecompressor()
    window = 16
    with open_shards(path, cache_bytes=2 * window * chunk * nbytes) as shards:
        out = {"image": np.empty((length, *image.shape[1:]), np.uint8)}

        def ours(order: np.ndarray) -> None:
            for batch in batches(order, length):
                shards.gather(batch, out)

        def pure(_order: np.ndarray) -> None:
            for chunk in stored:
                decompressor.decompress(chunk)

        epochs = iter(range(10_000))
        order = Order(len(image), 1, chunk=chunk, window=window)
        took = rates({"ours": ours, "pure": pure}, lambda: order.take(next(epochs), 0, len(image)), rounds)
    return took, image.size / sum(map(len, stored))


def against_decompression(side: str, folder: Path, rounds: int) -> Iterator[Record]:
    """Yield the records of compressed shards."""
    took, times = chunked_seconds(side, folder, rounds)
    context = {"codec": "zstd", "image": side, "chunk": CHUNK[side], "compressed": round(times, 2)}
    yield record("ratio_vs_decompress", ratios(took["pure"], took["ours"]), "x", context, 0.8, "higher")
    yield record("images_per_s", [SAMPLES[side] / one for one in took["ours"]], "/s", context, None, "higher")


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    given = parser.parse_args()
    shown: list[Record] = []
    try:
        for side in given.image:
            for kind in (against_files, against_decompression):
                with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                    shown += kind(side, Path(folder), given.rounds)
            print(f"{side} px: done", file=sys.stderr)
    except ImportError as error:
        cannot(f"{error}: `make setup` installs what the benchmarks compare with")
    show(shown, as_json=given.json)


if __name__ == "__main__":
    main()
