"""The leader's duties at a turn: the broker, the policy, requests, checkpoints, and the resize under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .. import events
from ..comm.liveness import Beats
from ..errors import LaunchError, ResizeRefused
from ..model import Member, Observation, Resize, Supply
from ..policy import bounded, check, give_back, leaving, newcomers
from ..processes import alive
from .agreement import END
from .inbox import Inbox
from .keeping import Keeping
from .plan import Office, Plan
from .reports import Here, Reports, await_ends
from .rest import LOOK_S, NO_REST, Rest
from .underway import Invitations, UnderWay, make_plan
from .warming import Warming

if TYPE_CHECKING:
    from ..comm.arrival import Arrivals
    from ..comm.world import World
    from ..protocols import Broker, Policy
    from .agreement import Verdict
    from .saving import Saving
    from .session import Session

STATUS_EVERY_S = 0.25
BACK_OFF_S = 10.0  # until a size that could not be reached is tried again; doubles each time
LONGEST_BACK_OFF_S = 320.0
FAREWELL_S = 2.0  # that the end waits for newcomers being connected: cut off inside MPI they would look like a crash
LONGEST_LEAVE_S = 30.0  # until a leaver whose process does not end no longer holds up the next resize


class Leader:
    """The part of rank 0 that no other rank has. It moves on with its `office` when rank 0 leaves or is lost.

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
        self.broker = broker
        self.policy = policy
        self.tethers = tethers
        self.reports = Reports(session)
        self.saving: Saving | None = None
        self._office = office
        self._put_office()  # or fail: whoever leads next takes it from there
        self.inbox = Inbox(self)
        self._invitations = Invitations(self)
        self._under_way: UnderWay | None = None
        self._committing: UnderWay | None = None
        self.keeping = Keeping(self)
        self._warming = Warming(self)
        self._next_status = 0.0
        self._rest = NO_REST
        self._leaving_since = session.clock()
        self._beats = Beats(session.run, session.config.stall_s)
        self._failed = (0, 0.0, BACK_OFF_S)  # ranks that could not be reached, when to try again, back-off after that

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
        if self._kept is not self._office:
            with self.reports.log.room():
                self._put_office()

    def _put_office(self) -> None:
        self.session.run.put(self.session.run.path / "office.json", self._office)
        self._kept = self._office

    # --- at a turn ----------------------------------------------------------------------------------------------------

    def turn(self, here: Here, point: int, losses: int) -> Plan | str | None:
        """Look at everything once; return a plan to carry out, "stop", "checkpoint", or None.

        With `hold`, wait for newcomers. `point` and `losses` are what a plan says of the members to newcomers.
        """
        now = self.session.clock()
        if self._rest.lasts(now, here, self.world, self._office):
            return None
        order = self._look(now, here, point, losses)
        if order is None and self._under_way is None:
            self._take_rest(now, here)
        return order

    def _take_rest(self, now: float, here: Here) -> None:
        """Leave the turns alone at which nothing can have come up."""
        step = here.cursor.step
        if not (self._office.leaving or self.inbox.waits or self.keeping.waits):
            next_steps = (
                self.policy.next_step(step, self._office.decided),
                self.broker.next_step(step),
                self.keeping.next_step(step),
            )
            self._rest = Rest(now + LOOK_S, min(next_steps), here.loop, self.world, self._office)

    def _look(self, now: float, here: Here, point: int, losses: int) -> Plan | str | None:
        hold = self.session.config.hold
        self.inbox.look(here)
        if now >= self._next_status:
            self._next_status = now + STATUS_EVERY_S
            self._keep_office()
            self._show(here)
        self._warming.look()
        told = self.inbox.leaving()
        if self.inbox.stops:
            self.say(here, f"the job stops at step {here.cursor.step}: {self.inbox.stops}")
            return "stop"
        kept = self.keeping.due(here)
        if kept:
            return kept
        # A resize is done when its leavers are gone: only then their slots can be had again.
        if hold:
            self.world.watch.until(self.all_gone, self.session.config.deadline_s, "leavers to end")
        if self._under_way is None and self.all_gone():
            if told is not None:
                self._begin(here, told, forced=True, minimum=1)
            else:
                self._decide(here)
        if self._under_way is not None:
            if hold:
                self._show(here)
                self.world.watch.until(lambda: self._under_way is None or self._advance(here), what="newcomers")
            if self._under_way is not None and self._advance(here):
                return make_plan(self, self._under_way, here, point, losses)
        return None

    def _show(self, here: Here) -> None:
        self.reports.status(here, self.world, self.office, "running", self._changing)

    def say(self, here: Here, text: str) -> None:
        """Say something about the step at hand."""
        self.reports.record(here, self.world, self.office, "running", self._changing)
        self.reports.say(text)

    @property
    def _changing(self) -> str:
        return f"{self.world.size} -> {self._under_way.resize.ranks} ranks" if self._under_way else ""

    def poll(self, here: Here) -> Supply:
        """Ask the broker for the supply, and give back what it granted too late."""
        supply = self.broker.poll(here.cursor.step, self.session.seconds(), max(self.office.peak_bytes, 1))
        known = self.office.leases
        if supply.leases != known and (self._under_way is None or not self._under_way.wanted):
            late = tuple(lease for lease in supply.leases if lease not in known)
            if late:
                self.broker.release(late)
        return supply

    # --- resizes ------------------------------------------------------------------------------------------------------

    def _decide(self, here: Here) -> None:
        office, supply = self.office, self.poll(here)
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
        least = max(seen.min_ranks, office.target)
        below = resize is None and self.world.size < least and supply.offered > 0
        if below:
            reason = "replaces what was lost" if office.target >= least else f"min = {seen.min_ranks}"
            resize = bounded(seen, least, reason)
        failed, retry_at, _ = self._failed
        if resize is None or (resize.ranks == failed and self.session.clock() < retry_at):
            return
        if office.asked is not None and resize.ranks != office.asked:
            self.reports.say(resize.reason)
        self._begin(here, resize, forced=below)

    def _begin(self, here: Here, resize: Resize, *, forced: bool, minimum: int | None = None) -> None:
        size = self.world.size
        minimum = self.session.config.min_ranks if minimum is None else minimum
        event = events.Decided(step=here.cursor.step, before=size, after=resize.ranks, reason=resize.reason)
        self.reports.log.write(event)
        try:
            check(resize.ranks, leavers=resize.leavers, now=size, minimum=minimum, maximum=self.office.max_ranks)
            wanted = newcomers(size, resize)
            arrivals = self._invitations.invite(wanted)
        except (ResizeRefused, LaunchError, OSError) as refusal:
            self._refused(here, resize, str(refusal), forced=forced)
            return
        self._under_way = UnderWay(resize, leaving(size, resize), arrivals, self.session.clock(), forced, wanted)
        self._next_status = 0.0
        self._take(self._under_way, here)

    def _take(self, way: UnderWay, here: Here) -> bool:
        """Start newcomers where slots were granted; False if the resize can't go on for that."""
        try:
            problem = self._invitations.take(way, here)
        except (LaunchError, OSError) as refusal:
            problem = str(refusal)
        if problem:
            self._give_up(here, problem, backs_off=False)
        return not problem

    def _advance(self, here: Here) -> bool:
        """Move the resize under way on; True when it can be committed."""
        way = self._under_way
        assert way is not None
        arrivals = way.arrivals
        if arrivals is None:
            return True
        if not self._take(way, here):
            return False
        problem = self._invitations.drop_failing(way, here) or arrivals.problem()
        if not problem and arrivals.passed(here.loop):
            # They connected for a loop that has ended meanwhile: they have to come again.
            self._again()
            return False
        arrivals.skip(here.loop)
        problem = problem or self._invitations.mismatch(way, here)
        waited = self.session.clock() - way.decided_s
        if not problem and waited > self.session.config.deadline_s:
            problem = f"the newcomers were not there after {waited:.0f} s"
        if problem:
            self._give_up(here, problem)
            return False
        if not way.wanted and arrivals.warm():
            arrivals.bring()
        return arrivals.there()

    def arrivals(self) -> Arrivals | None:
        """Return the newcomers that the plan takes in. Until `committed`, the resize can still be rolled back."""
        way, self._under_way = self._under_way, None
        self._committing = way
        return way.arrivals if way is not None else None

    # --- what becomes of a resize -------------------------------------------------------------------------------------

    def committed(self) -> None:
        """Know that the resize was carried out by all."""
        if self._committing is not None and self._committing.arrivals is not None:
            self._committing.arrivals.close()
        self._committing = None

    def resized(self, plan: Plan, stages: dict[str, float], state_bytes: int, moved_bytes: int) -> None:
        """Report a resize that was carried out. Called on the leader of the new generation."""
        self.reports.resized(plan, self.world.size, stages, state_bytes, moved_bytes)
        self._failed = (0, 0.0, BACK_OFF_S)
        self._invitations.came()
        self._next_status = 0.0

    def abandon(self) -> None:
        """End the newcomers under way, without waiting for them: the job has failed."""
        if self._under_way is not None and self._under_way.arrivals is not None:
            self._under_way.arrivals.terminate()

    def _again(self, patience_s: float = 0.0) -> UnderWay:
        """Call the resize under way off without counting it: the policy decides anew."""
        way, self._under_way = self._under_way, None
        assert way is not None
        self._invitations.dismiss(way, patience_s)
        return way

    def _give_up(self, here: Here, reason: str, *, backs_off: bool = True) -> None:
        """Call the resize under way off."""
        way = self._again()
        if backs_off:
            self._back_off(way)
        self._refused(here, way.resize, reason, forced=way.forced)

    def _back_off(self, way: UnderWay) -> None:
        """Try the size of a resize that failed again after some time only."""
        _, _, back_off = self._failed
        self._failed = (way.resize.ranks, self.session.clock() + back_off, min(2 * back_off, LONGEST_BACK_OFF_S))

    def _refused(self, here: Here, resize: Resize, why: str, *, forced: bool) -> None:
        self.reports.log.write(events.Refused(step=here.cursor.step, ranks=resize.ranks, reason=why))
        if resize.ranks != self.world.size or resize.leavers:
            self.say(here, f"resize to {resize.ranks} ranks given up at step {here.cursor.step}: {why}")
        if not forced:
            self.office = msgspec.structs.replace(self.office, decided=self.office.decided + 1, asked=None)

    def lost(self, verdict: Verdict, here: Here, seconds: dict[str, float], *, rolled_back: bool) -> None:
        """Take note of a loss, and of the resize that was rolled back for it. Called on the leader of the new generation."""
        way, self._committing = self._committing, None
        await_ends(self.session.run, (*verdict.lost, *verdict.dismissed))
        if rolled_back and way is not None:
            reasons = [self.how(member) for member in verdict.dismissed]
            self._back_off(way)
            self._refused(here, way.resize, "; ".join(reasons) or "a rank was lost meanwhile", forced=way.forced)
        if self._under_way is not None and verdict.lost:
            self._again()  # it was decided for other ranks
        used = {member.slot for member in (*verdict.survivors, *self.office.leaving)}
        used |= (
            {a.options.slot for a in self._under_way.arrivals.all} if self._under_way and self._under_way.arrivals else set()
        )
        self._invitations.release({lease.slot for lease in self.office.leases} - used)
        self.inbox.keep(told=self.office.told_but([member.id for member in verdict.lost]))
        if verdict.lost:
            if verdict.word != END:  # else the leader before may have said that the job has ended
                self.reports.record(here, self.world, self.office, "running")
            self.reports.lost(verdict, here, "; ".join(self.how(member) for member in verdict.lost), seconds)
        self._next_status = 0.0

    def how(self, member: Member) -> str:
        """Return how a process ended, for people: as its guard saw it, and what it said itself."""
        record, end = self.session.run.record(member.id), self.session.run.end_of(member.id)
        said = f": {record.error}" if record is not None and record.error else ""
        return f"process {member.id} (pid {member.pid} on {member.host}) {end.how() if end else 'was lost'}{said}"

    # --- leavers ------------------------------------------------------------------------------------------------------

    def all_gone(self) -> bool:
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
        for member in self.office.leaving:
            if self._beats.stalled(member.id):
                self.session.run.condemn(member.id)  # it hangs while it ends; its guard sees to that
        gone = [member for member in self.office.leaving if self._gone(member)]
        if gone:
            self._invitations.release({member.slot for member in gone})
            left = tuple(member for member in self.office.leaving if member not in gone)
            self.office = msgspec.structs.replace(self.office, leaving=left)
        return not self.office.leaving

    def _gone(self, member: Member) -> bool:
        if member.host == self.world.me.host and not alive(member.pid):
            return True
        record = self.session.run.record(member.id)
        if record is None:
            return False
        elsewhere = member.host != self.world.me.host
        return record.outcome == "parked" or (elsewhere and record.outcome == "retired")

    # --- people's requests, and the end -------------------------------------------------------------------------------

    def busy(self) -> str | None:
        """Return why no other resize can be asked for now, or None."""
        to = self._under_way.resize.ranks if self._under_way is not None else self.office.asked
        return f"a resize to {to} ranks is under way: ask again when it is done" if to is not None else None

    def asked(self, ranks: int) -> None:
        """Take note that a person wants `ranks` ranks."""
        self.office = msgspec.structs.replace(self.office, asked=ranks)

    def end(self, here: Here, *, stopped: bool) -> None:
        """Report the end of the job, and send newcomers still under way home."""
        self.keeping.report(here)
        if self._under_way is not None:
            self._refused(here, self._again(FAREWELL_S).resize, "the job ended before the newcomers were ready", forced=True)
        self.reports.end(here, self.world, self.office, stopped=stopped)
        if self.saving is not None:
            self.saving.store().clean()
