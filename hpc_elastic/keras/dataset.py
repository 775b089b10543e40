"""What `fit`, `evaluate` and `predict` are given: samples of a set, and which of their fields are inputs and targets."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

import keras

from ..errors import ConfigError
from ..model import whole
from ..sampler import Order, random_of, steps_per_epoch

if TYPE_CHECKING:
    from ..runtime.batches import Decode, Samples

Array = NDArray[Any]
Names = str | Sequence[str] | Mapping[str, str]
TARGETS = ("label", "target", "y")  # names of a field that is taken for the target if none is named
EXAMPLE = 2  # samples: with one, Keras would take the first axis for one that is always 1

_latest: list[weakref.ref[Data]] = []  # what Keras was given last: before its callbacks are called


class Arrays:
    """NumPy arrays of equal length as a data set."""

    chunk_samples = None
    reads_ahead = True

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.fields = {name: np.asarray(array) for name, array in arrays.items()}
        lengths = {name: len(array) if array.ndim else 0 for name, array in self.fields.items()}
        if not lengths or len(set(lengths.values())) > 1:
            raise ConfigError(f"he.keras.data needs arrays of one length, not of {lengths}")
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def gather(self, samples: NDArray[np.int64], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Return some samples, in the first rows of the arrays in `out` if there are any."""
        if out is None:
            return {name: array.take(samples, 0) for name, array in self.fields.items()}
        n = len(samples)  # "clip": there is none out of range, and with "raise" NumPy would copy once more
        return {name: array.take(samples, 0, out[name][:n], "clip") for name, array in self.fields.items()}


class Data(keras.utils.PyDataset):  # type: ignore[misc]
    """Samples for Keras; see `data`. Without a job, it is a data set of Keras's like others.

    Attributes
    ----------
    samples : Samples
        Where they come from.
    batch : int
        Samples in a step, over all ranks.
    decode : callable or None
        What is made of the fields of each microbatch.
    shuffle : bool
        False takes them in their order.
    seed : int or None
        Seed of the order; None is that of the job.
    names : list of str
        The fields that the model gets, as `structure` has them.
    structure : tuple
        Inputs, targets and weights, as nested as Keras gets them.
    """

    def __init__(
        self,
        samples: Samples,
        batch: int,
        inputs: Names | None,
        targets: Names | None,
        weights: str | None,
        decode: Decode | None,
        seed: int | None,
        *,
        shuffle: bool,
    ) -> None:
        super().__init__()
        self.samples, self.batch = samples, whole("he.keras.data: batch", batch)
        self.decode, self.shuffle, self.seed = decode, shuffle, seed
        if self.batch < 1 or not len(samples):
            raise ConfigError(f"he.keras.data of {len(samples)} samples in batches of {batch}: there must be some of each")
        self._order = Order(len(samples), seed or 0, shuffle, samples.chunk_samples)
        self._epoch, self._within, self._in_order = 0, False, True
        self._thread = threading.get_ident()
        example = self.fields(np.arange(min(EXAMPLE, len(samples))), 0, 0)
        self.structure = _structure(list(example), inputs, targets, weights)
        self.names: list[str] = keras.tree.flatten(self.structure)
        missing = [name for name in self.names if name not in example]
        if missing:
            raise ConfigError(f"he.keras.data has no field {missing[0]!r}; there are {', '.join(example)}")
        self.example = [np.asarray(example[name]) for name in self.names]

    def __len__(self) -> int:
        return steps_per_epoch(len(self.samples), self.batch)

    @property
    def num_batches(self) -> int:
        """Number of batches. Keras asks for it when it is given the data, and before `on_epoch_end`, but in `predict`."""
        if threading.get_ident() == self._thread:  # not tf.data's, which asks for it as well when it reads
            self._in_order = True
            _latest[:] = [weakref.ref(self)]
        return len(self)

    def __getitem__(self, index: int) -> Any:
        start, stop = index * self.batch, min((index + 1) * self.batch, len(self.samples))
        chosen = np.arange(start, stop) if self._in_order else self._order.take(self._epoch, start, stop)
        fields = self.fields(chosen, self._epoch * len(self) + index, 0)
        return self.packed([fields[name] for name in self.names])

    def fields(self, chosen: NDArray[np.int64], step: int, microbatch: int) -> Mapping[str, Array]:
        """Return the fields of the samples `chosen`, decoded with the random numbers of that microbatch."""
        fields = self.samples.gather(chosen)
        return fields if self.decode is None else self.decode(fields, random_of(self._order.seed, step, microbatch))

    def packed(self, flat: Sequence[Any]) -> Any:
        """Return arrays, in the order of `names`, as Keras gets them."""
        return keras.tree.pack_sequence_as(self.structure, list(flat))

    def on_epoch_begin(self) -> None:
        """Take down that Keras takes its batches from here now."""
        self._within = True

    def on_epoch_end(self) -> None:
        """Go on to the next epoch. In `fit` and `evaluate`, Keras calls this before the first one, too."""
        self._epoch += self._within
        self._within = self._in_order = False

    @property
    def in_use(self) -> bool:
        """True while Keras takes its batches from here."""
        return self._within


def latest() -> Data | None:
    """Return the data that Keras was given last, once; None if there is none."""
    return _latest.pop()() if _latest else None


def _structure(fields: Sequence[str], inputs: Names | None, targets: Names | None, weights: str | None) -> tuple[Any, ...]:
    """Return inputs, targets and weights as Keras nests them, with the fields' names in place of their arrays."""
    if targets is None:
        targets = next((name for name in TARGETS if name in fields and name != inputs), None)
    used = {*keras.tree.flatten(targets), weights}
    if inputs is None:
        left = [name for name in fields if name not in used]
        if len(left) != 1:
            raise ConfigError(
                f"he.keras.data can't tell the inputs among the fields {', '.join(fields)}: name them, as "
                "he.keras.data(…, inputs='image', targets='label'), or as a tuple or dict of names for several"
            )
        inputs = left[0]
    parts = [_nested(inputs), _nested(targets), weights]
    while parts[-1] is None:
        parts.pop()
    return tuple(parts)


def _nested(names: Names | None) -> Any:
    if names is None or isinstance(names, str):
        return names
    return dict(names) if isinstance(names, Mapping) else tuple(names)


def data(
    source: Samples | Mapping[str, Any],
    batch: int = 256,
    *,
    inputs: Names | None = None,
    targets: Names | None = None,
    weights: str | None = None,
    decode: Decode | None = None,
    shuffle: bool = True,
    seed: int | None = None,
) -> Data:
    """Return samples as ``fit``, ``evaluate`` and ``predict`` take them, in a job and without one.

    Parameters
    ----------
    source : ShardSet, or other data set, or dict of arrays
        What `open_shards` gives, or anything with a length and ``gather(samples)``, or NumPy arrays of one length by name.
    batch : int
        Samples in a step, over all ranks.
    inputs : str, sequence of str, or dict of str to str, optional
        The field that the model gets, or several, as a tuple, or as a dict by the names of its inputs. By default the only
        one that is nothing else.
    targets : str, sequence of str, or dict of str to str, optional
        The field to be learned; by default ``label``, ``target`` or ``y``, whichever there is.
    weights : str, optional
        The field with the weights of the samples.
    decode : callable, optional
        Called as ``decode(fields, random)``, as in ``job.steps``; the fields that it returns are those that are meant above.
    shuffle : bool
        False takes the samples in their order. Evaluation and prediction always do.
    seed : int, optional
        Seed of the order; that of the job by default.

    Notes
    -----
    Without a job, `fit` takes the batches in an order of Keras's, unless it is given ``shuffle=False``.

    Raises
    ------
    ConfigError
        If there is nothing in it, a field is not there, or it can't be told which are the inputs.
    """
    samples = Arrays(source) if isinstance(source, Mapping) else source
    return Data(cast("Samples", samples), batch, inputs, targets, weights, decode, seed, shuffle=shuffle)
