"""The leader's duties at every turn: the broker, the policy, people's requests, and the newcomers under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from .. import events
from ..comm.arrival import Arrival, Arrivals
from ..comm.liveness import alive
from ..comm.messages import Options
from ..comm.world import vendor
from ..errors import ResizeRefused
from ..model import Member, Observation, Resize, Supply
from ..policy import bounded, check, give_back, leaving, newcomers
from ..rundir import Answer
from .plan import Office, Parked, Plan
from .reports import Here, Reports
from .session import peak_bytes

if TYPE_CHECKING:
    from ..comm.world import World
    from ..protocols import Broker, Policy
    from .agreement import Verdict
    from .saving import Saving
    from .session import Session

INBOX_EVERY_S = 0.1
STATUS_EVERY_S = 0.25
BACK_OFF_S = 10.0  # until a size that could not be reached is tried again; doubles each time
LONGEST_BACK_OFF_S = 320.0
LONGEST_LEAVE_S = 30.0  # until a leaver whose process does not end no longer holds up the next resize


@dataclass
class UnderWay:
    """A resize between its decision and its commit; one that the broker forces is none of the policy's decisions."""

    resize: Resize
    leavers: tuple[int, ...]
    arrivals: Arrivals | None
    decided_s: float
    forced: bool


class Leader:
    """The part of rank 0 that no other rank has. It moves on with its `office` when rank 0 leaves.

    Parameters
    ----------
    session : Session
        The run.
    world : World
        The ranks.
    office : Office
        What the leader before knew.
    broker, policy
        Where slots come from, and who decides.
    tethers : dict
        Communicators of generations in which ranks were parked, by generation.
    """

    def __init__(
        self, session: Session, world: World, office: Office, broker: Broker, policy: Policy, tethers: dict[int, World]
    ) -> None:
        self.session = session
        self.world = world
        self._office = office
        self._keep_office()
        self.broker = broker
        self.policy = policy
        self.tethers = tethers
        self.reports = Reports(session)
        self.saving: Saving | None = None
        self._under_way: UnderWay | None = None
        self._committing: UnderWay | None = None
        self._stops = ""
        self._told_to_leave: dict[int, float] = {}
        self._saved_step, self._saved_s, self._save_now = 0, session.clock(), False
        self._next_inbox = self._next_status = 0.0
        self._leaving_since = session.clock()
        self._failed = (0, 0.0, BACK_OFF_S)  # ranks that could not be reached, when to try again, back-off after that

    # --- at every turn ------------------------------------------------------------------------------------------------

    @property
    def office(self) -> Office:
        """What the leader knows and the next one must; kept in a file, in case this process is lost."""
        return self._office

    @office.setter
    def office(self, office: Office) -> None:
        if office != self._office:
            self._office = office
            self._keep_office()

    def _keep_office(self) -> None:
        self.session.run.put(self.session.run.path / "office.json", self._office)

    def turn(self, here: Here, point: int, losses: int) -> Plan | str | None:
        """Look at everything once; return a plan to carry out, "stop", "checkpoint", or None. With `hold`, wait for newcomers.

        `point` and `losses` are what a plan says of the members to newcomers.
        """
        now = self.session.clock()
        if now >= self._next_inbox:
            self._next_inbox = now + INBOX_EVERY_S
            self._read_inbox(here)
        if now >= self._next_status:
            self._next_status = now + STATUS_EVERY_S
            under_way = f"{self.world.size} -> {self._under_way.resize.ranks} ranks" if self._under_way else ""
            self.reports.status(here, self.world, self.office, "running", under_way)
        if self._stops:
            self.reports.say(f"the job stops at step {here.cursor.step}: {self._stops}")
            return "stop"
        if self._checkpoint_due(here):
            return "checkpoint"
        # A resize is done when its leavers are gone: only then their slots can be had again.
        if self.session.config.hold:
            self.world.watch.until(self._all_gone, self.session.config.deadline_s, "leavers to end")
        if self._under_way is None and self._all_gone():
            self._decide(here)
        if self._under_way is not None:
            if self.session.config.hold:
                self.world.watch.until(lambda: self._under_way is None or self._advance(here), what="newcomers")
            if self._under_way is not None and self._advance(here):
                return self._plan(here, point, losses)
        return None

    def _checkpoint_due(self, here: Here) -> bool:
        """Tell whether a checkpoint is to be made now; one that is still being written has to be done first."""
        saving, config, now, step = self.saving, self.session.config, self.session.clock(), here.cursor.step
        if saving is None:
            return False
        for outcome in saving.outcomes():
            self.reports.log.write(outcome)
            if outcome.error:
                self.reports.say(f"checkpoint of step {outcome.step} failed, the job goes on: {outcome.error}")
        due = self._save_now or (0 < config.checkpoint_s <= now - self._saved_s)
        due = due or 0 < config.checkpoint_steps <= step - self._saved_step
        if not due or saving.busy or step == self._saved_step:
            return False
        self._saved_step, self._saved_s, self._save_now = step, now, False
        return True

    def _poll(self, here: Here) -> Supply:
        return self.broker.poll(here.cursor.step, self.session.seconds(), max(self.office.peak_bytes, 1))

    def _decide(self, here: Here) -> None:
        office, supply = self.office, self._poll(here)
        seen = Observation(
            step=here.cursor.step,
            time_s=self.session.seconds(),
            ranks=self.world.size,
            min_ranks=self.session.config.min_ranks,
            max_ranks=office.max_ranks,
            supply=supply,
            decided=office.decided,
            asked=office.asked,
        )
        forced = give_back(seen)
        if forced is not None:
            # Those leave whose slots the broker takes back.
            slots = {lease.slot for lease in supply.revoked}
            ranks = [rank for rank, member in enumerate(self.world.generation.members) if member.slot in slots]
            leavers = tuple(ranks[: self.world.size - forced.ranks])
            self._begin(here, msgspec.structs.replace(forced, leavers=leavers), forced=True)
            return
        resize = self.policy.decide(seen)
        if resize is None and office.asked is not None:
            self._refused(here, Resize(office.asked), supply.why or "nothing to change", forced=False)
            return
        below = resize is None and self.world.size < max(seen.min_ranks, office.target) and supply.offered > 0
        if below:
            fewer = self.world.size < office.target
            reason = "replaces what was lost" if fewer else f"min = {seen.min_ranks}"
            resize = bounded(seen, max(seen.min_ranks, office.target), reason)
        failed, retry_at, _ = self._failed
        if resize is None or (resize.ranks == failed and self.session.clock() < retry_at):
            return
        if office.asked is not None and resize.ranks != office.asked:
            self.reports.say(resize.reason)
        self._begin(here, resize, forced=below)

    def _begin(self, here: Here, resize: Resize, *, forced: bool) -> None:
        size, config = self.world.size, self.session.config
        event = events.Decided(step=here.cursor.step, before=size, after=resize.ranks, reason=resize.reason)
        self.reports.log.write(event)
        try:
            check(resize.ranks, leavers=resize.leavers, now=size, minimum=config.min_ranks, maximum=self.office.max_ranks)
            arrivals = self._invite(here, newcomers(size, resize))
        except (ResizeRefused, OSError) as refusal:
            self._refused(here, resize, str(refusal), forced=forced)
            return
        self._under_way = UnderWay(resize, leaving(size, resize), arrivals, self.session.clock(), forced)
        self._next_status = 0.0

    def _invite(self, here: Here, n: int) -> Arrivals | None:
        if n == 0:
            return None
        held = {lease.slot for lease in self.office.leases}
        self.broker.request(n, self.session.seconds() + self.session.config.deadline_s)
        leases = self._poll(here).leases
        new = [lease for lease in leases if lease.slot not in held]
        if len(new) < n:
            self.broker.release(tuple(new))
            raise ResizeRefused(f"{n} more ranks were asked for, but the broker granted {len(new)} slots")
        self.office = msgspec.structs.replace(self.office, leases=leases)
        reachable = [parked for parked in self.office.parked if parked.tether in self.tethers]
        arrivals = []
        for lease in new:
            if reachable:
                parked = reachable.pop(0)
                tether = (self.tethers[parked.tether].comm, parked.rank)
                arrivals.append(Arrival(self._options(parked.member.id, lease.slot), tether=tether))
            else:
                arrivals.append(Arrival(self._options(self.office.next_member, lease.slot)))
                self.office = msgspec.structs.replace(self.office, next_member=self.office.next_member + 1)
        return Arrivals(arrivals, self.session.run, vendor(), self.session.clock)

    def _options(self, member: int, slot: int) -> Options:
        session, script = self.session, self.session.script
        return Options(
            member=member,
            slot=slot,
            run_dir=str(session.run.path),
            settings=msgspec.to_builtins(session.config),
            argv=script.argv,
            module=script.module,
            path=script.path,
            directory=script.directory,
            started=session.started,
            leader=self.world.me,
        )

    def _advance(self, here: Here) -> bool:
        """Move the resize under way on; True when it can be committed."""
        assert self._under_way is not None
        arrivals = self._under_way.arrivals
        if arrivals is None:
            return True
        problem = arrivals.look()
        if not problem and arrivals.passed(here.loop):
            # They connected for a loop that has ended meanwhile: they have to come again.
            self._again()
            return False
        arrivals.skip(here.loop)
        problem = problem or self._mismatch(arrivals, here)
        waited = self.session.clock() - self._under_way.decided_s
        if not problem and waited > self.session.config.deadline_s:
            problem = f"the newcomers were not there after {waited:.0f} s"
        if problem:
            self.give_up(here, problem)
            return False
        if arrivals.warm():
            arrivals.bring()
        return arrivals.there()

    def _mismatch(self, arrivals: Arrivals, here: Here) -> str:
        for arrival in arrivals.all:
            if arrival.report is not None and tuple(arrival.report.names) != here.names:
                theirs = ", ".join(name for name in arrival.report.names if name not in here.names)
                ours = ", ".join(name for name in here.names if name not in arrival.report.names)
                return (
                    f"a newcomer has {theirs or 'nothing'} where the members have {ours or 'nothing'}: every rank must "
                    "register the same state, make the same arrays and read the same data"
                )
        return ""

    def _plan(self, here: Here, point: int, losses: int) -> Plan:
        assert self._under_way is not None
        way, old = self._under_way, self.world.generation
        joining = way.arrivals.all if way.arrivals is not None else []
        for arrival in joining:
            assert arrival.report is not None
            report = arrival.report
            self.reports.log.write(
                events.Ready(
                    member=report.member.id, host=report.member.host, stages={"spawn": arrival.spawn_s, **report.stages}
                )
            )
        number = old.number + 1
        reports = [arrival.report for arrival in joining if arrival.report is not None]
        if any(old.members[rank].parks for rank in way.leavers) and not self.office.told_of_parking:
            self.office = msgspec.structs.replace(self.office, told_of_parking=True)
            self.reports.say(
                "ranks that the launcher started together can't be ended singly: they are put to sleep and come back first; "
                "start with -n 1 to avoid that"
            )
        back = {report.member.id for report in reports}
        parked = tuple(p for p in self.office.parked if p.member.id not in back) + tuple(
            Parked(old.members[rank], number, rank) for rank in way.leavers if old.members[rank].parks
        )
        office = msgspec.structs.replace(
            self.office,
            target=way.resize.ranks,
            decided=self.office.decided + (not way.forced),
            asked=self.office.asked if way.forced else None,
            leaving=(*self.office.leaving, *(old.members[rank] for rank in way.leavers)),
            parked=parked,
            peak_bytes=max([self.office.peak_bytes, peak_bytes(), *(report.peak_bytes for report in reports)]),
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
            wait_s=self.session.clock() - way.decided_s,
            cursor=here.cursor,
            tally=here.tally,
            office=office,
            forms=tuple(array.form() for array in here.arrays),
        )

    def arrivals(self) -> Arrivals | None:
        """Return the newcomers that the plan takes in; they are the transition's from now on."""
        way, self._under_way = self._under_way, None
        self._committing = way
        return way.arrivals if way is not None else None

    def committed(self) -> None:
        """Know that the resize was carried out by all."""
        if self._committing is not None and self._committing.arrivals is not None:
            self._committing.arrivals.close()
        self._committing = None

    def lost(self, verdict: Verdict, here: Here, seconds: dict[str, float], *, rolled_back: bool) -> None:
        """Take note of a loss, and of the resize that was rolled back for it. Called on the leader of the new generation."""
        way, self._committing = self._committing, None
        if rolled_back and way is not None:
            assert way.arrivals is not None
            reasons = [self.how(member) for member in verdict.dismissed if self.session.run.end_of(member.id)]
            why = "; ".join(reasons) or "a rank was lost while it was carried out"
            self._back_off(way)
            self._refused(here, way.resize, why, forced=way.forced)
        if self._under_way is not None and verdict.lost:
            self._again()  # it was decided for other ranks
        used = {member.slot for member in (*verdict.survivors, *self.office.leaving)}
        unused = tuple(lease for lease in self.office.leases if lease.slot not in used)
        self.broker.release(unused)
        self.office = msgspec.structs.replace(
            self.office, leases=tuple(lease for lease in self.office.leases if lease.slot in used)
        )
        if verdict.lost:
            how = "; ".join(self.how(member) for member in verdict.lost)
            self.reports.lost(verdict, here, how, seconds)
        self._next_status = 0.0

    def how(self, member: Member) -> str:
        """Return how a process ended, for people: as its guard saw it, or as it said itself."""
        record, end = self.session.run.record(member.id), self.session.run.end_of(member.id)
        said = f": {record.error}" if record is not None and record.error else ""
        return f"process {member.id} (pid {member.pid} on {member.host}) {end.how() if end else 'was lost'}{said}"

    def _back_off(self, way: UnderWay) -> None:
        """Try the size of a resize that failed again after some time only."""
        _, _, back_off = self._failed
        self._failed = (way.resize.ranks, self.session.clock() + back_off, min(2 * back_off, LONGEST_BACK_OFF_S))

    # --- what becomes of a resize -------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """End the newcomers under way, without waiting for them: the job has failed."""
        if self._under_way is not None and self._under_way.arrivals is not None:
            self._under_way.arrivals.terminate()

    def _again(self) -> UnderWay:
        """Call the resize under way off without counting it: the policy decides anew."""
        way, self._under_way = self._under_way, None
        assert way is not None
        self._dismiss(way)
        return way

    def give_up(self, here: Here, reason: str) -> None:
        """Call the resize under way off."""
        way = self._again()
        self._back_off(way)
        self._refused(here, way.resize, reason, forced=way.forced)

    def _dismiss(self, way: UnderWay) -> None:
        if way.arrivals is None:
            return
        way.arrivals.dismiss(self.world.watch)
        slots = {arrival.options.slot for arrival in way.arrivals.all}
        gone = tuple(lease for lease in self.office.leases if lease.slot in slots)
        self.broker.release(gone)
        self.office = msgspec.structs.replace(self.office, leases=tuple(x for x in self.office.leases if x not in gone))

    def _refused(self, here: Here, resize: Resize, why: str, *, forced: bool) -> None:
        self.reports.log.write(events.Refused(step=here.cursor.step, ranks=resize.ranks, reason=why))
        if resize.ranks != self.world.size or resize.leavers:
            self.reports.say(f"resize to {resize.ranks} ranks given up at step {here.cursor.step}: {why}")
        if not forced:
            self.office = msgspec.structs.replace(self.office, decided=self.office.decided + 1, asked=None)

    def resized(self, plan: Plan, stages: dict[str, float], state_bytes: int, moved_bytes: int) -> None:
        """Report a resize that was carried out. Called on the leader of the new generation."""
        self.reports.resized(plan, self.world.size, stages, state_bytes, moved_bytes)
        self._failed = (0, 0.0, BACK_OFF_S)
        self._next_status = 0.0

    def _all_gone(self) -> bool:
        """Give back the slots of leavers whose processes have ended; True if all have."""
        if not self.office.leaving:
            self._leaving_since = self.session.clock()
            return True
        if self.session.clock() - self._leaving_since > LONGEST_LEAVE_S:
            late = ", ".join(str(member.id) for member in self.office.leaving)
            self.reports.say(
                f"process {late} left the job {LONGEST_LEAVE_S:.0f} s ago and still runs: its slot stays in use"
            )
            self.office = msgspec.structs.replace(self.office, leaving=())
            return True
        gone = [member for member in self.office.leaving if self._gone(member)]
        slots = {member.slot for member in gone}
        leases = tuple(lease for lease in self.office.leases if lease.slot in slots)
        self.broker.release(leases)
        self.office = msgspec.structs.replace(
            self.office,
            leaving=tuple(member for member in self.office.leaving if member not in gone),
            leases=tuple(lease for lease in self.office.leases if lease not in leases),
        )
        return not self.office.leaving

    def _gone(self, member: Member) -> bool:
        if member.host == self.world.me.host and not alive(member.pid):
            return True
        record = self.session.run.record(member.id)
        if record is None:
            return False
        elsewhere = member.host != self.world.me.host
        return record.outcome == "parked" or (elsewhere and record.outcome == "retired")

    # --- people's requests --------------------------------------------------------------------------------------------

    def _read_inbox(self, here: Here) -> None:
        for name, request in self.session.run.requests():
            if request is None or request.kind not in ("resize", "stop", "checkpoint", "leave"):
                self.session.run.answer(name, Answer(accepted=False, text="the request can't be read"))
            elif request.kind == "stop":
                self._stops = "asked for"
                self.session.run.answer(name, Answer(accepted=True, text=f"the job stops at step {here.cursor.step}"))
            elif request.kind == "checkpoint":
                self._save_now = True
                self.session.run.answer(
                    name, Answer(accepted=True, text=f"a checkpoint is made from step {here.cursor.step}")
                )
            elif request.kind == "leave":
                self._told_to_leave.setdefault(request.ranks, self.session.clock())
                self.session.run.answer(name, Answer(accepted=True, text=f"process {request.ranks} leaves"))
            else:
                self.session.run.answer(name, self._asked(here, request.ranks))

    def _asked(self, here: Here, ranks: int) -> Answer:
        if self._under_way is not None or self.office.asked is not None or not self._all_gone():
            if not self._all_gone():
                return Answer(
                    accepted=False, text="a resize is under way, its leavers are still ending: ask again in a moment"
                )
            to = self._under_way.resize.ranks if self._under_way is not None else self.office.asked
            return Answer(accepted=False, text=f"a resize to {to} ranks is under way: ask again when it is done")
        config, size = self.session.config, self.world.size
        if config.policy != "manual":
            return Answer(
                accepted=False,
                text=f'the job decides by itself (policy = "{config.policy}"): start it with policy = "manual"',
            )
        try:
            check(ranks, leavers=(), now=size, minimum=config.min_ranks, maximum=self.office.max_ranks)
            self._check_supply(ranks, self._poll(here))
        except ResizeRefused as refusal:
            self.reports.log.write(events.Refused(step=here.cursor.step, ranks=ranks, reason=str(refusal)))
            return Answer(accepted=False, text=str(refusal))
        self.office = msgspec.structs.replace(self.office, asked=ranks)
        return Answer(accepted=True, text=f"{size} -> {ranks} ranks")

    def _check_supply(self, ranks: int, supply: Supply) -> None:
        most = self.world.size + supply.offered
        if ranks > most:
            raise ResizeRefused(f"{ranks} ranks asked for, but only {most} can be had: {supply.why}")

    def end(self, here: Here, *, stopped: bool) -> None:
        """Report the end of the job, and send newcomers still under way home."""
        if self.saving is not None:
            for outcome in self.saving.outcomes():
                self.reports.log.write(outcome)
        if self._under_way is not None:
            self._dismiss(self._under_way)
            self._under_way = None
        self.reports.end(here, self.world, self.office, stopped=stopped)
