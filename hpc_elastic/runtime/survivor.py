"""What a survivor does with a loss that its function can't go on after: it leaves the function, and enters it again."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from .. import events
from ..comm.waiting import Lost
from ..errors import Rewound
from .plan import Tally

if TYPE_CHECKING:
    from .job import Job

NOTICE_S = 10.0  # how long after an error of MPI's, in a call of the user's, a loss that explains it may take to be seen


def rewound(job: Job, error: BaseException) -> bool:
    """Make `job` ready to be entered again after `error`, if that came of a loss; False if it did not.

    Raises
    ------
    LostRank
        If the ranks that are left don't come together.
    """
    member, begun = job.membership, time.monotonic()
    if member.world is None or member.retired or job.session.config.recovery == "restart":
        return False
    before = job.here.cursor.step
    if not isinstance(error, Rewound):
        if not isinstance(error, Lost) and not (_of_mpi(error) and _bereft(job)):
            return False
        _recover(job)
    while True:
        try:
            source = job.begin_again()
        except Lost:
            _recover(job)
        else:
            break
    leader = member.leader
    if leader is not None:
        loop, cursor = job.begins_at
        seconds, ranks = time.monotonic() - begun, leader.world.size
        leader.reports.log.write(
            events.Rewound(loop=loop, step=cursor.step, before=before, source=source, seconds=seconds, ranks=ranks)
        )
        text = f"the {ranks} ranks that are left begin again at step {cursor.step}, from {source}"
        if loop == job.here.loop:
            leader.say(msgspec.structs.replace(job.here, cursor=cursor, tally=Tally(began=time.time())), text)
        else:
            leader.reports.say(text)  # the status is of another loop until that is entered
    return True


def _recover(job: Job) -> None:
    with contextlib.suppress(Rewound):
        job.membership.recover(job.here)


def _of_mpi(error: BaseException) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and isinstance(error, mpi.Exception)


def _bereft(job: Job) -> bool:
    """Tell whether a member is lost, as soon as that can be seen."""
    deadline = time.monotonic() + NOTICE_S
    while not job.membership.bereft():
        if time.monotonic() > deadline or job.session.run.failed():
            return False
        time.sleep(0.01)
    return True
