"""The broker for Slurm: asks for companions, one node each, and gives them back as the job and the queue need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...model import Lease, Supply
from .companions import Companion, companion_of
from .desk import Desk, State
from .wishes import Needs, Queue, seen_from

FIRST_REST_S, LONGEST_REST_S = 5.0, 300.0  # how long nothing is asked for after a refusal
DEAD_S = 5.0  # without a sign of life of a companion's agent, while Slurm says its node is not well, or it is not there
SOON_S = 60.0  # before its own end a companion is given back, if the job goes on after that


@dataclass(frozen=True)
class Limits:
    """What the user allows.

    Attributes
    ----------
    considerate : bool
        True leaves pending jobs of others what they could start with.
    ranks_per_node : int
        Ranks on each node.
    patience_s : float
        How long a companion may be pending.
    node_hours : float
        Node-hours that companions may use in all; 0 for no limit.
    """

    considerate: bool = True
    ranks_per_node: int = 1
    patience_s: float = 10.0
    node_hours: float = 0.0


class SlurmBroker:
    """Offers slots on this host, as many as a node has ranks, and on idle nodes of the cluster.

    Parameters
    ----------
    desk : Desk
        Reads the queue and carries orders.
    needs : Needs
        What a companion needs, and what the job's own allocation is.
    limits : Limits
        What the user allows.
    leases : tuple of Lease
        Leases held from the start.
    clock : callable
        Seconds since the epoch.
    """

    def __init__(
        self,
        desk: Desk,
        needs: Needs,
        limits: Limits,
        leases: tuple[Lease, ...] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._needs = needs
        self._limits = limits
        self._clock = clock
        self._leases = leases
        self._awaited: dict[int, float] = {}  # companion -> when it was asked for
        self._refused = ""
        self._rest_s, self._rest_until = FIRST_REST_S, 0.0
        self._bars: dict[str, float] = {}  # node -> until when it is not used
        self._slot_bars: dict[int, float] = {}
        self._judged: tuple[State, Queue] | None = None
        self._next = max(desk.state.companions, default=-1) + 1
        held = {companion_of(lease.slot) for lease in leases}
        for number, companion in desk.state.companions.items():
            if companion.end is None and number not in held:
                # Of a leader or an attempt before: nobody runs there.
                desk.cancel(number, "nobody was running there")

    # --- what the runtime calls ---------------------------------------------------------------------------------------

    def poll(self, step: int, time_s: float, peak_bytes: int) -> Supply:  # noqa: ARG002
        """Return the supply, as it was read last."""
        state, now = self._desk.state, self._clock()
        self._grant(state, now)
        queue = self._queue(state)
        back = dict(self._ending(state, queue, now))
        revoked = tuple(lease for lease in self._leases if companion_of(lease.slot) in back)
        offered, why = self._offer(state, queue, now)
        if back:
            why = "; ".join(dict.fromkeys(back.values()))
        pending = sum(self._ranks(state, number) for number in self._awaited)
        return Supply(offered, self._leases, revoked, why, pending, "" if pending else self._refused)

    def request(self, n: int, deadline_s: float) -> None:  # noqa: ARG002
        """Grant free slots of this host at once, and ask for companions for the others."""
        self._refused = ""
        own = self._own_free()[: max(n, 0)]
        self._leases += tuple(Lease(slot) for slot in own)
        state, now = self._desk.state, self._clock()
        queue = self._queue(state)
        left = n - len(own)
        room = len(self._free(state, queue, now)) if now >= self._rest_until else 0
        options = self._needs.options(now, exclude=[node for node, until in self._bars.items() if until > now])
        while left > 0 and room > 0:
            ranks = min(left, self._limits.ranks_per_node)
            self._desk.ask(self._next, ranks, (*options, f"--comment={self._desk.name(self._next)}"))
            self._awaited[self._next] = now
            self._next, left, room = self._next + 1, left - ranks, room - 1
        if left > 0:
            self._refused = f"no nodes for {left} ranks: {self._offer(state, queue, now)[1]}"

    def withdraw(self) -> None:
        """Ask no more for companions that are pending."""
        for number in self._awaited:
            self._desk.cancel(number, "it was withdrawn")

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Give leases back. A companion without leases is ended, and its node not used for `bar_s` seconds."""
        gone = {lease.slot for lease in leases} & {lease.slot for lease in self._leases}
        before = {companion_of(lease.slot) for lease in self._leases}
        self._leases = tuple(lease for lease in self._leases if lease.slot not in gone)
        after = {companion_of(lease.slot) for lease in self._leases}
        companions = self._desk.state.companions
        if bar_s > 0:
            until = self._clock() + bar_s
            self._slot_bars |= {slot: until for slot in gone if companion_of(slot) < 0}
            nodes = {c.held.node for slot in gone if (c := companions.get(companion_of(slot))) and c.held}
            self._bars |= dict.fromkeys(nodes, until)
        for number in before - after - {-1} - self._awaited.keys():
            self._desk.release(number)

    # --- what has come of requests ------------------------------------------------------------------------------------

    def _grant(self, state: State, now: float) -> None:
        """Add the leases of companions that have begun to run; forget those that won't."""
        for number, since in list(self._awaited.items()):
            companion = state.companions.get(number)
            if companion is None:
                continue  # the files are read in a moment
            if companion.end is not None:
                del self._awaited[number]
                self._refused = companion.end
                self._rest_until, self._rest_s = now + self._rest_s, min(2 * self._rest_s, LONGEST_REST_S)
            elif companion.held is not None and not companion.told:
                del self._awaited[number]
                self._rest_s = FIRST_REST_S
                self._leases += self._leases_of(companion)
            elif now - since > self._limits.patience_s:
                self._awaited[number] = float("inf")  # once
                reason = self._queue(state).pending.get(number, "it stayed pending")
                self._desk.cancel(number, f"no node within {self._limits.patience_s:g} s: {reason}")

    def _leases_of(self, companion: Companion) -> tuple[Lease, ...]:
        assert companion.held is not None
        gpus = [gpu for gpu in companion.held.gpus.split(",") if gpu]
        each = len(gpus) // max(companion.asked.ranks, 1)
        return tuple(
            Lease(slot, companion.held.host, companion.number, ",".join(gpus[each * i : each * (i + 1)]))
            for i, slot in enumerate(companion.slots)
        )

    @staticmethod
    def _ranks(state: State, number: int) -> int:
        companion = state.companions.get(number)
        return companion.asked.ranks if companion is not None else 1

    # --- what there is ------------------------------------------------------------------------------------------------

    def _queue(self, state: State) -> Queue:
        """Return what the queue means for the job; worked out once for each reading."""
        if self._judged is None or self._judged[0] is not state:
            if self._judged is not None and self._judged[0].snapshot is state.snapshot:
                queue = self._judged[1]
            else:
                queue = seen_from(state.snapshot, self._needs, state.companions)
            self._judged = state, queue
        return self._judged[1]

    def _own_free(self) -> list[int]:
        now = self._clock()
        taken = {lease.slot for lease in self._leases}
        barred = {slot for slot, until in self._slot_bars.items() if until > now}
        return [slot for slot in range(self._limits.ranks_per_node) if slot not in taken | barred]

    def _live(self, state: State) -> dict[int, Companion]:
        return {n: c for n, c in state.companions.items() if c.end is None and not c.released and c.held is not None}

    def _free(self, state: State, queue: Queue, now: float) -> list[str]:
        """Return idle nodes that may be taken."""
        taken = {c.held.node for c in state.companions.values() if c.held is not None and c.end is None}
        barred = {node for node, until in self._bars.items() if until > now}
        room = queue.room(self._live(state), considerate=self._limits.considerate)
        free = [node for node in room.free if node not in taken | barred]
        return free[: max(0, len(free) - len(self._awaited))]

    def _offer(self, state: State, queue: Queue, now: float) -> tuple[int, str]:
        """Return how many more ranks there could be, and what limits that."""
        own = len(self._own_free())
        if state.snapshot is None:
            return own, state.trouble or "the queue has not been read yet"
        if now < self._rest_until:
            return own, f"the last request was refused, the next comes in {self._rest_until - now:.0f} s: {self._refused}"
        if self._used_up(state, now):
            return own, f"node_hours = {self._limits.node_hours:g} are used up"
        if (left := queue.ends - now) < self._needs.least_s:
            return own, f"the job's time limit is {max(left, 0):.0f} s away"
        room = queue.room(self._live(state), considerate=self._limits.considerate)
        stale = f" (Slurm does not answer: {state.trouble})" if state.trouble else ""
        if state.trouble:
            return own, room.why + stale
        return own + self._limits.ranks_per_node * len(self._free(state, queue, now)), room.why

    def _used_up(self, state: State, now: float) -> bool:
        limit = self._limits.node_hours
        return 0 < limit <= sum(companion.seconds(now) for companion in state.companions.values()) / 3600

    # --- what has to go -----------------------------------------------------------------------------------------------

    def _ending(self, state: State, queue: Queue, now: float) -> list[tuple[int, str]]:
        """Return the companions that have to go, and why."""
        found = []
        used_up = self._used_up(state, now)
        live = self._live(state)
        room = queue.room(live, considerate=self._limits.considerate)
        held = {companion_of(lease.slot) for lease in self._leases} - {-1}
        for number in sorted(held):
            companion = state.companions.get(number)
            if companion is None:
                continue
            node = companion.held.node if companion.held else "?"
            ends = queue.end_of.get(number, float("inf"))
            if companion.end is not None:
                found.append((number, f"the companion on {node} ended: {companion.end}"))
            elif companion.told or number in queue.preempted:
                found.append((number, f"Slurm takes {node} back: it is preempted"))
            elif node in queue.failing:
                found.append((number, f"{node} is {queue.failing[node]}"))
            elif ends - now < SOON_S < queue.ends - now:
                found.append((number, f"the companion on {node} is near its time limit"))
            elif used_up:
                found.append((number, f"node_hours = {self._limits.node_hours:g} are used up"))
            elif number in room.back:
                found.append((number, room.why))
        return found
