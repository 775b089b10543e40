"""Ranks of one process, in threads."""

from __future__ import annotations

import threading

LIMIT_S = 20


class Threads:
    """Threads that meet at a barrier, each with what `rank(self, number)` returns for it."""

    def __init__(self, size, rank):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=LIMIT_S)
        self._rank = rank

    def run(self, body):
        """Return what ``body(rank)`` returns on every rank; raise what one of them raises."""
        results, errors = [None] * self.size, []

        def one(number):
            try:
                results[number] = body(self._rank(self, number))
            except BaseException as error:  # noqa: BLE001  a test's thread hands all errors on
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return results
