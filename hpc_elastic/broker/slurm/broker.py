"""The broker for Slurm: asks for companions, one node each, and gives them back as the job and the queue need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...model import LOCALHOST, OWN, Lease, Supply
from ...protocols import Stepless
from .companions import Companion, companion_of
from .desk import Desk, State
from .room import Room
from .wishes import LEAST_S, Queue, seen_from

FIRST_REST_S, LONGEST_REST_S = 5.0, 300.0  # how long nothing is asked for after a refusal
COMING_S = 30.0  # how long a node that was given back is waited for; others may have it whose jobs are not to be seen
GIVEN_UP = float("inf")
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
    own_host : str
        Host of the job's batch script, where ranks can be started without a companion.
    """

    considerate: bool = True
    ranks_per_node: int = 1
    patience_s: float = 10.0
    node_hours: float = 0.0
    own_host: str = LOCALHOST


class SlurmBroker(Stepless):
    """Offers slots on this host, as many as a node has ranks, and on idle nodes of the cluster.

    Parameters
    ----------
    desk : Desk
        Reads the queue and carries orders.
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
        limits: Limits,
        leases: tuple[Lease, ...] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._limits = limits
        self._clock = clock
        self._leases = leases
        self._awaited: dict[int, float] = {}  # companion -> when it was asked for
        self._refused = ""
        self._rest_s, self._rest_until = FIRST_REST_S, 0.0
        self._coming: dict[int, float] = {}  # companion given back, whose node Slurm does not have yet -> since when
        self._bars: dict[str, float] = {}  # node -> until when it is not used
        self._slot_bars: dict[int, float] = {}
        self._judged: tuple[object, Queue] = None, Queue()
        self._seen: tuple[tuple[object, object, object], Room] = (None, None, None), Room(())
        self._next = max(desk.state.companions, default=-1) + 1
        held = {companion_of(lease.slot) for lease in leases}
        for number, companion in desk.state.companions.items():
            if companion.end is None and number not in held:
                # Of a leader or an attempt before: nobody runs there.
                desk.cancel(number, "nobody was running there")
                if companion.held is not None:
                    self._coming[number] = clock()

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
        self._leases += tuple(Lease(slot, self._limits.own_host) for slot in own)
        state, now = self._desk.state, self._clock()
        queue = self._queue(state)
        left = n - len(own)
        room = len(self._free(state, queue, now)) if now >= self._rest_until and not state.trouble else 0
        barred = [node for node, until in self._bars.items() if until > now]
        while left > 0 and room > 0 and state.needs is not None:
            ranks = min(left, self._limits.ranks_per_node)
            self._desk.ask(self._next, ranks, state.needs.asked(now, barred))
            self._awaited[self._next] = now
            self._next, left, room = self._next + 1, left - ranks, room - 1
        if left > 0:
            self._refused = f"no nodes for {left} ranks: {self._offer(state, queue, now)[1]}"

    def withdraw(self) -> None:
        """Ask no more for companions that are pending."""
        for number in self._awaited:
            self._desk.cancel(number, "it was withdrawn")
        self._awaited = dict.fromkeys(self._awaited, GIVEN_UP)

    def release(self, leases: tuple[Lease, ...], bar_s: float = 0.0) -> None:
        """Give leases back. A companion without leases is ended, and its node not used for `bar_s` seconds."""
        gone = {lease.slot for lease in leases} & {lease.slot for lease in self._leases}
        before = {companion_of(lease.slot) for lease in self._leases}
        self._leases = tuple(lease for lease in self._leases if lease.slot not in gone)
        after = {companion_of(lease.slot) for lease in self._leases}
        companions = self._desk.state.companions
        if bar_s > 0:
            until = self._clock() + bar_s
            self._slot_bars |= {slot: until for slot in gone if companion_of(slot) == OWN}
            nodes = {c.held.node for slot in gone if (c := companions.get(companion_of(slot))) and c.held}
            self._bars |= dict.fromkeys(nodes, until)
        for number in before - after - {OWN} - self._awaited.keys():
            self._desk.release(number)
            self._coming[number] = self._clock()

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
            elif since == GIVEN_UP:
                continue  # though it may have begun at the last moment: its agent, or Slurm, ends it
            elif companion.held is not None and not companion.told:
                del self._awaited[number]
                self._rest_s = FIRST_REST_S
                self._leases += self._leases_of(companion)
            elif now - since > self._limits.patience_s:
                self._awaited[number] = GIVEN_UP
                self._desk.give_up(number, f"no node within {self._limits.patience_s:g} s")

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
        if state.snapshot is not None and state.needs is not None and self._judged[0] is not state.snapshot:
            self._judged = state.snapshot, seen_from(state.snapshot, state.needs, state.companions)
        return self._judged[1]

    def _own_free(self) -> list[int]:
        now = self._clock()
        taken = {lease.slot for lease in self._leases}
        barred = {slot for slot, until in self._slot_bars.items() if until > now}
        return [slot for slot in range(self._limits.ranks_per_node) if slot not in taken | barred]

    @staticmethod
    def _live(state: State) -> dict[int, str]:
        """Return the companions that are held, and their nodes."""
        there = state.companions.items()
        return {n: c.held.node for n, c in there if c.end is None and not c.released and c.held is not None}

    def _room(self, state: State, queue: Queue, now: float) -> Room:
        """Return the room; worked out once for each reading, since a step asks several times."""
        coming = self._nodes_coming(state, queue, now)
        before, room = self._seen
        if before[0] is not queue or before[1] is not state.companions or before[2] != coming:
            room = queue.room(self._live(state), coming, is_considerate=self._limits.considerate)
            self._seen = (queue, state.companions, coming), room
        return room

    def _nodes_coming(self, state: State, queue: Queue, now: float) -> frozenset[str]:
        """Return the nodes that were given back and that Slurm has not been seen to have."""
        found = set()
        for number, since in list(self._coming.items()):
            companion = state.companions.get(number)
            if companion is None or companion.held is None:
                continue  # the files are read in a moment
            late = companion.end is not None and now - max(companion.ended_s, since) > COMING_S
            if late or (state.read_s > since and queue.has_back(companion.held.node, companion.asked.allocation)):
                del self._coming[number]
            else:
                found.add(companion.held.node)
        return frozenset(found)

    def _free(self, state: State, queue: Queue, now: float) -> list[str]:
        """Return idle nodes that may be taken."""
        taken = {c.held.node for c in state.companions.values() if c.held is not None and c.end is None}
        barred = {node for node, until in self._bars.items() if until > now}
        room = self._room(state, queue, now)
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
        if (left := queue.own_end_s - now) < LEAST_S:
            return own, f"the job's time limit is {max(left, 0):.0f} s away"
        room = self._room(state, queue, now)
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
        room = self._room(state, queue, now)
        held = {companion_of(lease.slot) for lease in self._leases} - {OWN}
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
            elif ends - now < SOON_S < queue.own_end_s - now:
                found.append((number, f"the companion on {node} is near its time limit"))
            elif used_up:
                found.append((number, f"node_hours = {self._limits.node_hours:g} are used up"))
            elif number in room.back:
                found.append((number, room.why))
        return found
