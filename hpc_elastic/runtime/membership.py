"""One rank's place among the others: its generation, the resize points it passes, and the losses it goes on after."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec

from .. import faults
from ..comm.door import Door
from ..comm.messages import Report
from ..comm.vendor import orphaned_shared_memory
from ..comm.waiting import LeftOut, Lost, Watch
from ..errors import JobError, LostRank, Retired, Rewound
from ..model import Member
from ..redistribute import DistributedArray
from ..state import Registry
from .agreement import CHECKPOINT, COPY, END, NOTHING, RESIZE, STOP, UNKNOWN, Account, Verdict
from .offices import first_office, make_leader, next_leader
from .place import Place
from .plan import Office, Plan
from .recovery import Meeting, Toll, generation_after, names, needs_all, ranks_of, send_away, standing
from .reports import Here
from .session import OVER, Session, peak_bytes
from .transition import Stages, Transition
from .vigil import NO_MEETINGS, Vigil

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..comm.world import World
    from .leader import Leader
    from .saving import Saving

WORDS = {"stop": STOP, "checkpoint": CHECKPOINT, "copy": COPY, "end": END}


class Membership:
    """A rank among the others.

    Attributes
    ----------
    world : World or None
        The generation it belongs to; none in a newcomer that has not joined, and in one that has left.
    leader : Leader or None
        On rank 0.
    called, entered, retired : bool
        True once a newcomer was called in, once it is a member, and once it has left.
    """

    def __init__(self, session: Session, member: Member, world: World | None, door: Door | None, vigil: Vigil) -> None:
        self.session = session
        self.member = member
        self.world = world
        self.door = door
        self.vigil = vigil
        self.registry = Registry()
        self.arrays: list[DistributedArray] = []
        self.leader: Leader | None = None
        self.saving: Saving | None = None
        self.entered = self.called = world is not None
        self.retired = False
        self._tethers: dict[int, World] = {}
        self._place = Place()
        self._moving: Transition | None = None
        self._settled: World | None = None
        self._office: Office | None = None  # of a resize that is committed, until the next leader is in it
        self._fresh: World | None = None  # while it is not certain that all survivors have it
        self._toll = Toll(session.run)
        self.watch = Watch(vigil.check, vigil.blocking, vigil.users, vigil.broken)
        vigil.waits = self.watch.seconds
        if door is not None:
            door.use(self.watch)
            vigil.watch(door.leader)
        if world is not None:
            world.watch = self.watch
            vigil.losses = 0
            vigil.watch(world.generation.members)
            if world.rank == 0:
                self.leader = make_leader(session, world, first_office(session, world), self._tethers)

    def joined(self) -> World:
        """Return the world of this rank's generation."""
        if self.world is None:
            raise JobError(
                "this rank has not joined the job yet: it does so where the loop over job.steps or job.loop begins"
            )
        return self.world

    # --- resize points ------------------------------------------------------------------------------------------------

    def pass_point(self, here: Here, own: str = "") -> int:
        """Carry out what the leader decided, or its `own` word, and return it: `agreement.NOTHING` and so on. Collective."""
        self._place.at_point()
        while True:
            try:
                return self._pass(here, own)
            except Lost:
                if self._recover(here):
                    return RESIZE

    def _pass(self, here: Here, own: str) -> int:
        faults.at("point")
        word = self._place.foretold()
        if word != UNKNOWN:
            return word
        world = self.joined()
        order: Plan | str | None = None
        said = NOTHING
        if self.leader is not None:
            self.vigil.glance()
            order = own or self.leader.turn(here, self._place.point, self.vigil.losses)
            said = NOTHING if order is None else WORDS[order] if isinstance(order, str) else RESIZE
        word = self._place.word = world.word(said)
        if word == RESIZE:
            self._resize(world, order if isinstance(order, Plan) else None)
        elif word != NOTHING:
            self._place.ready = True
            world.barrier()  # whoever is past this place knows that all others have the word
        return word

    def _resize(self, world: World, own_plan: Plan | None) -> None:
        stages = Stages(self.session.clock)
        moving = self._moving = Transition(self.registry, self.arrays, stages, world)
        with stages.stage("drain"):
            told = world.tell(msgspec.msgpack.encode(own_plan) if own_plan is not None else None)
            plan = moving.plan = msgspec.msgpack.decode(told, type=Plan)
            self.vigil.watch(plan.members)
            arrivals = self.leader.arrivals() if self.leader is not None else None
        moving.of_member(plan, arrivals)
        self._settle(moving)

    def _settle(self, moving: Transition) -> None:
        """Go on in the next generation, or leave."""
        plan, self._moving = moving.plan, None
        assert plan is not None
        self._office = plan.office
        if self.leader is not None:
            self.leader.committed()
        tether = moving.tidy()
        if self.door is not None:
            self.door.close()
            self.door = None
        if tether is not None:
            self._tethers[plan.generation] = tether
        world = self.world = moving.settled
        if world is None:
            self.leader = None
            self.vigil.watch(())
            return
        self.vigil.watch(world.generation.members)
        self._lead(world)
        if self.leader is not None:
            self.leader.resized(plan, moving.stages.seconds, moving.state_bytes, moving.moved_bytes)

    def _lead(self, world: World) -> None:
        """Be the leader if this is rank 0 now."""
        planned, self._office = self._office, None
        self.leader = next_leader(self.session, world, self.leader, planned, self._tethers)
        if self.leader is not None:
            self.leader.saving = self.saving

    # --- sums ---------------------------------------------------------------------------------------------------------

    def summed(self, here: Here, exchange: Callable[[], None]) -> bool:
        """Do the sum of a step by `exchange`; False if it has to be done anew, by fewer ranks. Collective.

        The barrier lets nobody have the sum before all have it: a rank can be lost before or after, not between.
        """
        self._place.at_sum()
        try:
            faults.at("sum")
            exchange()
            self._place.ready = True
            self.joined().barrier()
        except Lost:
            self._recover(here)
            if self._place.again():
                self._place.at_sum()
                return False
        return True

    def pass_by(self) -> None:
        """Pass a point at which nothing happens: a sum that belongs to no step comes next. On all ranks, like any point."""
        self._place.at_point(NOTHING)

    # --- losses -------------------------------------------------------------------------------------------------------

    def _recover(self, here: Here) -> bool:
        """Go on without those that were lost, and those lost meanwhile; True if the resize under way was committed."""
        committed = False
        while True:
            try:
                return self._meet(here) or committed
            except Lost:
                committed = committed or (self.world is not None and self.world is self._settled)

    def _meet(self, here: Here) -> bool:
        """Agree with the other survivors, and come together; True if the resize under way was committed."""
        clock, moving, place = self.session.clock, self._moving, self._place
        begun = clock()
        number, members = standing(self.world, moving)
        account = Account(
            member=self.member,
            generation=number,
            members=members,
            place=place.number,
            ready=moving.prepared if moving is not None else place.ready,
            word=place.word,
            step=here.cursor.step,
            joining=moving.joining if moving is not None else (),
            needs_all=needs_all(here) if place.word != END else "",
            unwound=place.unwound,
        )
        verdict = Meeting(self.session.run, self.vigil, self.session.config.deadline_s).agree(account, self.session.check)
        agreed = clock()
        self._moving = None
        place.agreed(verdict)
        committed = moving if moving is not None and verdict.generation == number + 1 else None
        if committed is not None and committed.settled is None:
            self.retired, self.world, self.leader = True, None, None
            raise Retired(f"process {self.member.id} left the job while another was lost")
        if verdict.refused and self.session.config.recovery == "restart":
            raise LostRank(names(self.session.run, verdict) + f", and can't be done without: {verdict.refused}")
        if self.member.id not in {member.id for member in verdict.survivors}:
            raise LeftOut("the others went on without this process: it had stalled, or its resize was called off")
        if self._fresh is not None and verdict.generation == self._fresh.generation.number:
            self.world = self._fresh  # others are in it already, so all came through
        self._fresh = None
        if moving is not None and committed is None:
            moving.roll_back()
        if committed is not None and committed.settled is not None:
            self.world = self._settled = committed.settled  # another loss would find this rank there
            self._office = committed.plan.office if committed.plan is not None else None
        self._rebuild(verdict)
        if self.leader is not None:
            if committed is not None and committed.plan is not None:
                self.leader.committed()
                self.leader.resized(committed.plan, committed.stages.seconds, committed.state_bytes, committed.moved_bytes)
            seconds = {"agree": agreed - begun, "rebuild": clock() - agreed}
            self.leader.lost(verdict, here, seconds, rolled_back=moving is not None and committed is None)
        self._toll.count(verdict)
        if verdict.refused:
            raise Rewound(names(self.session.run, verdict))
        return committed is not None

    def recover(self, here: Here) -> None:
        """Come together with the other survivors, after the user's function was left.

        Raises
        ------
        Rewound
            Always, if it does not fail.
        """
        self._place.unwound = "the function given to he.run was left on a rank"
        self._recover(here)
        raise Rewound

    def begin_again(self) -> None:
        """Be as at the start, but in the generation at hand: the user's function is entered again."""
        self.registry, self.arrays = Registry(), []
        self._place, self._moving = Place(), None
        if not self.entered:
            self.entered = self.called = True
            self.session.record(self.member, "member")

    def _rebuild(self, verdict: Verdict) -> None:
        """Come together with the other survivors."""
        faults.at("rebuild")
        base = self.joined()
        self.vigil.watch(verdict.survivors)
        if self.leader is not None or verdict.survivors[0].id == self.member.id:
            send_away(verdict.dismissed, self.session.run)
        survivors = ranks_of(base.generation.members, verdict.survivors)
        world = self._fresh = base.rebuild(survivors, generation_after(verdict), self.vigil.losses, self.vigil.greeted)
        world.open_user()
        world.barrier()  # who is past it knows that all others have the new world
        self.world, self._fresh, self.door = world, None, None
        self._lead(world)

    # --- coming and going ---------------------------------------------------------------------------------------------

    def leave(self, here: Here) -> None:
        """End this rank's part: unwind, or sleep until it is wanted again."""
        if not self.member.parks:
            self.retired = True
            faults.at("retire")
            raise Retired(f"process {self.member.id} left the job at step {here.cursor.step}")
        self.vigil.losses = NO_MEETINGS
        self.session.record(self.member, "parked")
        tether = self._tethers[max(self._tethers)]
        self.door, options = Door.parked(tether.comm, self.session.run, self.watch, self.session.doze)
        self.vigil.watch(self.door.leader)
        self.member = msgspec.structs.replace(self.member, slot=options.slot)
        self.session.began, self.session.how, self.session.start_s = self.session.clock(), "parked", 0.0

    def join(self, here: Here) -> tuple[str, Plan | None]:
        """Report ready, wait to be called, and come in; return the last call, and the plan that was carried out.

        The call is "enter", "skip" this loop, or "go" away.
        """
        door, stages = self.door, Stages(self.session.clock)
        assert door is not None
        faults.at("warm")
        report = Report(
            member=self.member,
            loop=here.loop,
            names=list(here.names),
            how=self.session.how,
            stages={"start": self.session.start_s, "warm": self.session.clock() - self.session.began},
            peak_bytes=peak_bytes(),
        )
        door.report(report)
        while True:
            call = door.called()
            if call.order == "skip":
                return "skip", None
            if call.order == "go":
                door.close()
                return "go", None
            if call.order == "enter":
                break
        self.called = True
        moving = self._moving = Transition(self.registry, self.arrays, stages)
        try:
            moving.of_newcomer(door, self.watch, self._told)
        except Lost:
            if moving.plan is None or not self._recover(here):
                raise
        else:
            self._settle(moving)
        self.entered = True
        plan = cast("Plan", moving.plan)
        if plan.loop != here.loop:
            raise JobError(f"joined in loop {plan.loop} while standing in loop {here.loop}")
        self.session.record(self.member, "member")
        return "enter", plan

    def _told(self, plan: Plan) -> None:
        """Know, in a newcomer, what the members know."""
        self._place.called_in(plan.point, RESIZE)
        self.vigil.losses = plan.losses
        self.vigil.watch(plan.members)

    # --- the end ------------------------------------------------------------------------------------------------------

    def end(self, here: Here, *, stopped: bool) -> None:
        """End the job on all ranks. Collective."""
        self.joined()
        faults.at("end")
        if self.pass_point(here, "end") != END:
            raise JobError(f"this rank left the loop at step {here.cursor.step}, and rank 0 did not: all have to")
        status = self.session.run.status()
        over = status is not None and status.state in OVER  # if a leader was lost just after it had said so
        if self.leader is not None and not over:
            self.leader.end(here, stopped=stopped)
            if self.vigil.losses:
                for segment in orphaned_shared_memory(self.session.started):
                    segment.unlink(missing_ok=True)  # what those that were lost could not remove
        self.session.record(self.member, "ended")

    def bereft(self) -> bool:
        """Tell whether a member is lost; for who is not waiting."""
        try:
            self.vigil.check()
        except Lost:
            return True
        except JobError:
            pass
        return False

    def abandon(self) -> None:
        """Let newcomers under way end with the job that has failed."""
        if self.leader is not None:
            self.leader.abandon()

    def close(self) -> None:
        """Free the communicators."""
        self.vigil.close()
        for world in (self.world, *self._tethers.values()):
            if world is not None:
                world.close()
        self.world = None
        self._tethers.clear()
        if self.door is not None:
            self.door.close()
