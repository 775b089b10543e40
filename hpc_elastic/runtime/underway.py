"""A resize under way, between its decision and its commit: newcomers are invited, looked after, and sent away again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from .. import events, faults
from ..comm.arrival import Arrival, Arrivals
from ..comm.bridge import Bridge, Join, Spawn
from ..comm.liveness import Beats
from ..comm.messages import Options
from ..comm.world import vendor
from ..model import Lease, Resize
from ..processes import alive
from .plan import Parked, Plan
from .session import peak_bytes

if TYPE_CHECKING:
    from .leader import Leader
    from .plan import Office
    from .reports import Here

BAR_S = 10.0  # how long the slot of a newcomer that could not come is not used; doubles each time
LONGEST_BAR_S = 320.0


@dataclass
class UnderWay:
    """One resize; one that the broker forces, or a loss, is none of the policy's decisions.

    `wanted` is the number of slots that are asked for and not granted yet.
    """

    resize: Resize
    leavers: tuple[int, ...]
    arrivals: Arrivals | None
    decided_s: float
    forced: bool
    wanted: int = 0


class Invitations:
    """Invites newcomers for a leader, and knows which slots failed lately.

    Parameters
    ----------
    leader : Leader
        The leader.
    """

    def __init__(self, leader: Leader) -> None:
        self._leader = leader
        self._bars: dict[int, float] = {}  # slot -> seconds of its next bar
        self._bridge: Bridge | None = None

    def invite(self, n: int) -> Arrivals | None:
        """Ask for `n` slots, where newcomers are to start; None if there are to be none."""
        if n == 0:
            return None
        leader = self._leader
        faults.at("request")
        leader.broker.request(n, leader.session.seconds() + leader.session.config.deadline_s)
        run, clock = leader.session.run, leader.session.clock
        return Arrivals(run, self.bridge(), Beats(run, leader.session.config.stall_s), clock)

    def take(self, way: UnderWay, here: Here) -> str:
        """Start newcomers in the slots that were granted since the last call; return why none can come, if that is so."""
        if not way.wanted or way.arrivals is None:
            return ""
        leader, asked = self._leader, way.wanted + len(way.arrivals.all)
        supply = leader.poll(here)
        held = {lease.slot for lease in leader.office.leases}
        new = [lease for lease in supply.leases if lease.slot not in held]
        self._start(way.arrivals, new[: way.wanted])
        if new[way.wanted :]:
            leader.broker.release(tuple(new[way.wanted :]))
        way.wanted -= min(way.wanted, len(new))
        if not way.wanted or supply.pending:
            return ""
        granted = asked - way.wanted
        why = supply.refused or f"{asked} more ranks were asked for, but the broker granted {granted} slots"
        if not way.arrivals.all:
            return why
        ranks = way.resize.ranks - way.wanted
        leader.reports.log.write(
            events.Refused(step=here.cursor.step, ranks=way.resize.ranks, reason=f"goes on to {ranks}: {why}")
        )
        way.resize, way.wanted = msgspec.structs.replace(way.resize, ranks=ranks), 0
        return ""

    def _start(self, arrivals: Arrivals, leases: list[Lease]) -> None:
        """Start newcomers in the slots of `leases`; parked ranks come first."""
        if not leases:
            return
        leader, host = self._leader, self._leader.world.me.host
        office = leader.office
        taken = {arrival.options.member for arrival in arrivals.all}
        reachable = [
            parked
            for parked in office.parked
            if parked.tether in leader.tethers
            and parked.member.id not in taken
            and (parked.member.host != host or alive(parked.member.pid))
        ]
        started, number = [], office.next_member
        for lease in leases:
            if reachable:
                parked = reachable.pop(0)
                tether = (leader.tethers[parked.tether].comm, parked.rank)
                started.append(Arrival(self._options(parked.member.id, lease), tether=tether))
            else:
                started.append(Arrival(self._options(number, lease)))
                number += 1
        # Written down before anything is started.
        leader.office = msgspec.structs.replace(office, leases=(*office.leases, *leases), next_member=number)
        for arrival in started:
            arrivals.add(arrival)

    def bridge(self) -> Bridge:
        """Return how newcomers are connected with."""
        if self._bridge is None:
            self._bridge = Join(vendor()) if self._leader.session.config.joins else Spawn()
        return self._bridge

    def _options(self, member: int, lease: Lease) -> Options:
        session, script = self._leader.session, self._leader.session.script
        return Options(
            member=member,
            slot=lease.slot,
            companion=lease.companion,
            host=lease.host,
            gpus=lease.gpus,
            run_dir=str(session.run.path),
            settings=msgspec.to_builtins(session.config),
            argv=script.argv,
            module=script.module,
            path=script.path,
            directory=script.directory,
            started=session.started,
            leader=self._leader.world.me,
            launcher=self.bridge().launcher(session.run, member),
        )

    def drop_failing(self, way: UnderWay, here: Here) -> str:
        """Go on without newcomers that can't come; return why the resize as a whole can't go on, or an empty string."""
        arrivals = way.arrivals
        assert arrivals is not None
        for arrival, reason in arrivals.failing():
            if not arrivals.drop(arrival):
                return reason
            slot = arrival.options.slot
            bar_s = self._bars.get(slot, BAR_S)
            self._bars[slot] = min(2 * bar_s, LONGEST_BAR_S)
            self.release({slot}, bar_s)
            if not arrivals.all and not way.wanted:
                return reason
            self._leader.reports.log.write(
                events.Refused(step=here.cursor.step, ranks=way.resize.ranks, reason=f"goes on without one: {reason}")
            )
            self._leader.reports.say(f"a newcomer could not come, slot {slot} is not used for {bar_s:.0f} s: {reason}")
        return ""

    def mismatch(self, way: UnderWay, here: Here) -> str:
        """Return what a newcomer has that the members don't, or the other way round."""
        for arrival in way.arrivals.all if way.arrivals is not None else []:
            if arrival.report is not None and tuple(arrival.report.names) != here.names:
                theirs = ", ".join(name for name in arrival.report.names if name not in here.names)
                ours = ", ".join(name for name in here.names if name not in arrival.report.names)
                return (
                    f"a newcomer has {theirs or 'nothing'} where the members have {ours or 'nothing'}: every rank must "
                    "register the same state, make the same arrays and read the same data"
                )
        return ""

    def dismiss(self, way: UnderWay, patience_s: float = 0.0) -> None:
        """Send the newcomers of a resize away, and give their slots back; see `Arrivals.dismiss`."""
        if way.arrivals is not None:
            if way.wanted:
                self._leader.broker.withdraw()
            slots = {arrival.options.slot for arrival in way.arrivals.all}
            way.arrivals.dismiss(patience_s)
            self.release(slots)

    def release(self, slots: set[int], bar_s: float = 0.0) -> None:
        """Give slots back, which the broker does not offer for `bar_s` seconds."""
        leader = self._leader
        gone = tuple(lease for lease in leader.office.leases if lease.slot in slots)
        leader.broker.release(gone, bar_s)
        leader.office = msgspec.structs.replace(
            leader.office, leases=tuple(lease for lease in leader.office.leases if lease not in gone)
        )

    def came(self) -> None:
        """Forget earlier failures: newcomers have come."""
        self._bars.clear()


def make_plan(leader: Leader, way: UnderWay, here: Here, point: int, losses: int) -> Plan:
    """Return the plan of a resize whose newcomers are there."""
    old = leader.world.generation
    number = old.number + 1
    joining = way.arrivals.all if way.arrivals is not None else []
    reports = [arrival.report for arrival in joining if arrival.report is not None]
    for arrival, report in zip(joining, reports, strict=True):
        stages = {"spawn": arrival.spawn_s, **report.stages}
        leader.reports.log.write(
            events.Ready(member=report.member.id, host=report.member.host, how=report.how, stages=stages)
        )
    back = {report.member.id for report in reports}
    parks = [rank for rank in way.leavers if old.members[rank].parks]
    parked = tuple(p for p in leader.office.parked if p.member.id not in back)
    office: Office = msgspec.structs.replace(
        leader.office,
        target=way.resize.ranks,
        generation=number,
        decided=leader.office.decided + (not way.forced),
        asked=leader.office.asked if way.forced else None,
        leaving=(*leader.office.leaving, *(old.members[rank] for rank in way.leavers)),
        told=leader.office.told_but([old.members[rank].id for rank in way.leavers]),
        parked=parked + tuple(Parked(old.members[rank], number, rank) for rank in parks),
        told_of_parking=leader.office.told_of_parking or bool(parks),
        peak_bytes=max([leader.office.peak_bytes, peak_bytes(), *(report.peak_bytes for report in reports)]),
    )
    if office.told_of_parking and not leader.office.told_of_parking:
        leader.reports.say(
            "ranks that were started together can't be ended singly: they are put to sleep and come back first; to avoid "
            "that, start by hpc-elastic run or mpirun, with -n 1"
        )
    return Plan(
        generation=number,
        loop=here.loop,
        point=point,
        losses=losses,
        members=(*old.members, *(report.member for report in reports)),
        joining=len(reports),
        leavers=way.leavers,
        reason=way.resize.reason,
        wait_s=leader.session.clock() - way.decided_s,
        cursor=here.cursor,
        tally=here.tally,
        office=office,
        forms=tuple(array.form() for array in here.arrays),
    )
