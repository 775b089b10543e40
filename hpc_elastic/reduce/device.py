"""The sum of GPU arrays over ranks: staged through the memory of the hosts, or from GPU to GPU by NCCL."""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ..arrays import gpu, nccl
from ..arrays.host import Array
from .adding import add_up
from .choice import Found, choose
from .form import Form, Pool, Slot, Slots
from .node import Transport, cut
from .order import There, pairs, whole_tree

if TYPE_CHECKING:
    from . import Ranks

log = logging.getLogger(__name__)


class GpuSlots(Slots):
    """Slots in the memory of this rank's GPU."""

    def _made(self, offset: int) -> Slot:
        return self.form.slot(gpu.empty(self.form.nbytes))._replace(offset=offset)

    @cached_property
    def own(self) -> Slot:
        """One that nobody else sees, for results."""
        return self.form.slot(gpu.empty(self.form.nbytes))

    @cached_property
    def stage(self) -> Pool:
        """Slots of the same form, on the host."""
        return Pool(self.form)


def way(ranks: Ranks, by_host: Transport[Pool], *, exact: bool) -> Transport[GpuSlots]:
    """Return how GPU arrays of `ranks` are added up. Collective; `by_host` is the way of the same sum on hosts."""
    line = ranks.keep("nccl", lambda: _line(ranks))
    if isinstance(line, nccl.Line):
        return Nccl(ranks, line) if exact else NcclLibrary(ranks, line)
    return Staged(by_host)


class NoLine:
    """What is kept where there is no line, so that nobody tries again."""

    def close(self) -> None:
        """There is nothing to end."""


def _line(ranks: Ranks) -> nccl.Line | NoLine:
    """Return a line by NCCL if all ranks can have one. Collective."""
    mine = Found(socket.gethostname(), gpu.name(), nccl.version())
    found = [msgspec.msgpack.decode(data, type=Found) for data in ranks.gather_all(msgspec.msgpack.encode(mine))]
    choice = choose(found)
    log.info("GPU arrays go %s: %s", "by NCCL" if choice.nccl else "through the hosts' memory", choice.reason)
    if not choice.nccl:
        return NoLine()
    key = ranks.gather_all(nccl.fresh_key() if not ranks.rank else b"")[0]
    device, line, why = gpu.current(), None, b""
    try:
        line = ranks.watch.apart(lambda: nccl.connect(key, ranks.size, ranks.rank, device))
    except nccl.error() as error:
        why = str(error).encode()
    failed = [(rank, text.decode()) for rank, text in enumerate(ranks.gather_all(why)) if text]
    if line is not None and not failed:
        return line
    if line is not None:
        line.close()
    log.warning("GPU arrays go through the hosts' memory: NCCL failed on rank %d: %s", *failed[0])
    return NoLine()


class Staged:
    """Copies partial sums into memory of the host, adds up there, and copies the result back."""

    def __init__(self, by_host: Transport[Pool]) -> None:
        self._by_host = by_host
        self._held: list[Slot] = []  # on the host, of the last sum, which others may still read

    def small(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot:
        stage = self._staged(pool, mine)
        total = self._by_host.small(form, pool.stage, stage, there)
        self._held = stage
        return self._back(pool, total)

    def large(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot:
        total = self._by_host.large(form, pool.stage, self._staged(pool, mine), there)
        self._held = []
        return self._back(pool, total)

    def _staged(self, pool: GpuSlots, mine: Sequence[Slot]) -> list[Slot]:
        pool.stage.recall(self._held)
        stage = [pool.stage.take() for _ in mine]
        for slot, target in zip(mine, stage, strict=True):
            gpu.pin(target.memory)
            gpu.fetch(slot.memory, target.memory)
        gpu.wait()
        return stage

    def _back(self, pool: GpuSlots, total: Slot) -> Slot:
        gpu.pin(total.memory)
        gpu.settle()  # who borrowed the last result may still read it, on a stream of its own
        gpu.put(total.memory, pool.own.memory)
        gpu.wait()  # others may write there as soon as they meet again
        return pool.own


class _ByNccl(ABC):
    def __init__(self, ranks: Ranks, line: nccl.Line) -> None:
        self._ranks = ranks
        self._line = line

    def small(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot:
        return self.large(form, pool, mine, there)

    @abstractmethod
    def large(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot: ...

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Wait for the stream as for a message: whoever waits in vain for a lost rank goes on without it."""
        gpu.settle()  # who borrowed the last result may still read it, on a stream of its own
        try:
            with self._ranks.watch.blame(nccl.error()):
                yield
                self._ranks.watch.until(self._done())
        except BaseException:
            self._line.close()
            raise

    def _done(self) -> Callable[[], bool]:
        finished = gpu.finished()

        def done() -> bool:
            self._line.check()
            return finished()

        return done


class Nccl(_ByNccl):
    """Each rank gets one slice of all partial sums, adds it up along the tree, and gives the result to the others."""

    def large(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot:  # noqa: ARG002
        with self._watched():
            for dtype, out in pool.own.flat.items():
                self._add_up([slot.flat[dtype] for slot in mine], out, there)
        return pool.own

    def _add_up(self, mine: Sequence[Array], out: Array, there: There) -> None:
        ranks = self._ranks
        slices = [slice(*cut(len(out), ranks.size, rank, out.itemsize)) for rank in range(ranks.size)]
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        total = out[slices[ranks.rank]]
        parts = [
            [array[slices[rank]] for array in mine] if rank == ranks.rank else [np.empty_like(total) for _ in nodes]
            for rank, nodes in enumerate(there)
        ]
        self._line.trade(
            [(rank, array[slices[rank]]) for rank in others for array in mine],
            [(rank, part) for rank in others for part in parts[rank]],
        )
        if total.nbytes:
            add_up(whole_tree(there), [part for group in parts for part in group], total, total.nbytes)
        self._line.trade([(rank, total) for rank in others], [(rank, out[slices[rank]]) for rank in others])


class NcclLibrary(_ByNccl):
    """NCCL's own sum, in an order of its own."""

    def large(self, form: Form, pool: GpuSlots, mine: Sequence[Slot], there: There) -> Slot:  # noqa: ARG002
        tree = pairs(there[self._ranks.rank]) if mine else None
        for dtype in pool.own.flat:
            nccl.kind(dtype)  # before anything is under way
        with self._watched():
            for dtype, out in pool.own.flat.items():
                if tree is None:
                    out.fill(0)
                elif len(out):
                    add_up(tree, [slot.flat[dtype] for slot in mine], out, out.nbytes)
                if len(out):
                    self._line.add_up(out)
        return pool.own
