"""How a leader comes into office: its broker, its policy, and the first office of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..broker.local import LocalBroker
from ..broker.script import ScriptBroker
from ..errors import ConfigError
from ..model import Lease
from ..policy import Eager, Fixed, Manual, Timetable
from .leader import Leader
from .plan import Office

if TYPE_CHECKING:
    from ..comm.world import World
    from ..config import Config
    from ..protocols import Broker, Policy
    from .session import Session


def make_broker(session: Session, leases: tuple[Lease, ...]) -> Broker:
    """Return the broker configured, which holds `leases` already."""
    config = session.config
    if config.broker == "slurm":
        from ..broker.slurm.making import make

        return make(config, session.run.path, leases)
    if config.broker == "script":
        return ScriptBroker.parse(config.supply, leases=leases)
    return LocalBroker(
        slots=config.slots or None,
        cores_per_rank=config.cores_per_rank,
        gpus_per_rank=config.gpus_per_rank,
        leases=leases,
    )


def make_policy(config: Config) -> Policy:
    """Return the policy configured."""
    if config.decides in ("considerate", "greedy"):
        return Eager()
    if config.policy == "timetable":
        return Timetable.parse(config.timetable)
    if config.policy == "fixed":
        return Fixed(config.ranks)
    return Manual()


def first_office(session: Session, world: World) -> Office:
    """Return the office at the start of a run: the seed ranks hold the first slots."""
    config, size = session.config, world.size
    if config.max_ranks and size > config.max_ranks:
        raise ConfigError(f"the launcher started {size} ranks, but max = {config.max_ranks}: start fewer or raise max")
    leases = tuple(Lease(member.slot, member.host) for member in world.generation.members)
    office = Office(
        next_member=size,
        max_ranks=config.max_ranks or _most_ranks(session, size, leases),
        target=size,
        asked=config.ranks if config.decides == "manual" and config.ranks > size else None,
        leases=leases,
    )
    if session.checkpoint is None:
        return office
    notes = session.checkpoint.about.notes
    target = min(notes["target"], office.max_ranks)
    return msgspec.structs.replace(office, decided=notes["decided"], asked=notes["asked"] or office.asked, target=target)


def _most_ranks(session: Session, size: int, leases: tuple[Lease, ...]) -> int:
    """Return how many ranks there can be, where the settings don't say."""
    config = session.config
    if config.broker == "slurm":
        return max(size, config.microbatches)  # more than that can't share a step
    return max(config.ranks, size + make_broker(session, leases).poll(0, 0.0, 1).offered)


def kept_office(session: Session) -> Office:
    """Return the office that a lost leader left behind."""
    office = session.run.get(session.run.path / "office.json", Office)
    assert office is not None, "the first leader writes it at once"
    numbers = [int(path.name.split(".")[0]) for path in session.run.newcomers.glob("[0-9]*.json")]
    return msgspec.structs.replace(office, next_member=max([office.next_member, *(number + 1 for number in numbers)]))


def make_leader(session: Session, world: World, office: Office, tethers: dict[int, World]) -> Leader:
    """Return the leader of `world`, with the office of the one before."""
    config = session.config
    broker, policy = make_broker(session, office.leases), make_policy(config)
    return Leader(session, world, msgspec.structs.replace(office), broker, policy, tethers)


def next_leader(
    session: Session, world: World, leader: Leader | None, planned: Office | None, tethers: dict[int, World]
) -> Leader | None:
    """Return the leader in this process, if it is rank 0 of `world`: `leader` if it was before, or a new one.

    A new one has the office `planned` at the last resize, or what a lost leader left since then.
    """
    if world.rank != 0:
        return None
    if leader is None:
        kept = kept_office(session)
        newer = planned is not None and planned.generation > kept.generation
        return make_leader(session, world, planned if newer and planned else kept, tethers)
    leader.world = world
    leader.office = planned or leader.office
    return leader
