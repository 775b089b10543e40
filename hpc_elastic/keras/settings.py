"""The settings without which the bits of TensorFlow depend on the machine: to set them, and to check them."""

from __future__ import annotations

import os
from pathlib import Path

from .. import warmth
from ..errors import ConfigError

REHEARSAL = f"{__package__}.rehearsal"
LARGEST_SET = "ONEDNN_MAX_CPU_ISA"
# Instruction sets, as Linux names them, by which TensorFlow's libraries choose at run time how to add up.
INSTRUCTIONS = (
    *("avx", "fma", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx10_2", "amx_bf16", "amx_fp16"),
    *("asimd", "bf16", "sve", "sve2"),
)


def _rehearse(threads: int) -> None:
    """Have newcomers rehearse, with so many threads, before they are asked for."""
    warmth.rehearsals[REHEARSAL] = {"threads": threads}


def same_bits(*, threads: int = 1, seed: int = 0) -> None:
    """Make TensorFlow compute the same bits on every rank. To be called before the first operation.

    Parameters
    ----------
    threads : int
        Threads within an operation; another number gives other bits, so it is the same on all ranks.
    seed : int
        Seed of the initial weights.

    Raises
    ------
    ConfigError
        If TensorFlow is running already.

    Notes
    -----
    Sets op determinism, which forbids operations whose result depends on timing; switches the graph's arithmetic
    optimisation off, which reorders sums; and fixes the threads, since a sum cut in two rounds otherwise than in one.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # on each rank: warnings and errors
    import tensorflow as tf

    import keras

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        raise ConfigError("he.keras.same_bits() must come before the first TensorFlow operation") from error
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    _rehearse(threads)


def check() -> None:
    """Check that this process computes the same bits as the others; set what can be set still.

    Raises
    ------
    ConfigError
        If Keras runs on something else than TensorFlow, the number of threads is left to the machine, or XLA is on.
    """
    import tensorflow as tf

    import keras

    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"he.keras works with Keras on TensorFlow, and this is Keras on {keras.backend.backend()}: "
            "set KERAS_BACKEND=tensorflow"
        )
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if not threads:
        raise ConfigError(
            "TensorFlow would take as many threads as each machine has cores, and other numbers give other bits: call "
            "he.keras.same_bits(threads=1) at the top of the script, before TensorFlow is used; or give "
            "he.keras.Elasticity(job, exact=False), for sums whose last bits depend on the ranks"
        )
    flags = os.environ.get("TF_XLA_FLAGS", "")
    if ("auto_jit" in flags and "auto_jit=0" not in flags) or tf.config.optimizer.get_jit():
        raise ConfigError(
            f"XLA would compile what it likes (TF_XLA_FLAGS={flags!r}, tf.config.optimizer.set_jit), and its bits depend on "
            "what it fuses: switch that off"
        )
    # These two are read whenever something is traced, so it is not too late for them.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    tf.config.experimental.enable_op_determinism()
    _rehearse(threads)


def of_bits() -> str:
    """Return what the bits depend on and all ranks must have in common, as newcomers and checkpoints are compared by it."""
    import tensorflow as tf

    import keras

    threads = tf.config.threading.get_intra_op_parallelism_threads()
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default")
    largest = f" up to {os.environ[LARGEST_SET]}" if LARGEST_SET in os.environ else ""
    return f"TensorFlow {tf.__version__}, Keras {keras.__version__}, threads {threads}, oneDNN {onednn}{largest}"


def instructions(file: Path = Path("/proc/cpuinfo")) -> list[bool]:
    """Return which of `INSTRUCTIONS` this processor has; none if `LARGEST_SET` bounds what is used, for all alike."""
    if LARGEST_SET in os.environ or not file.exists():
        return [False] * len(INSTRUCTIONS)
    lines = (line for line in file.read_text().splitlines() if line.startswith(("flags", "Features")))
    found = next(lines, "").split()
    return [name in found for name in INSTRUCTIONS]
