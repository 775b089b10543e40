"""A fault at every stage, in every role that passes it: the job always comes to the same result, and nothing is left of it.

All of them are tested with ``--all-faults``, some otherwise; ``--fault-table FILE.md`` writes down what happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_elastic import events
from hpc_elastic.config import FAULT_VARIABLE
from hpc_elastic.faults import STAGES

from ..afterwards import AS_EVER, BEGAN_AGAIN, DROPPED, RESTARTED, ROLLED_BACK, WENT_ON, check_ledger, happened, outcome
from ..launch import SCRIPTS, Job, hpc_elastic
from ..shards import SAMPLES
from . import fault_table
from .fault_table import ACTIONS

EPOCHS, PAUSE_S = 4, 0.01
SIZE, TURNS = 33, 64
DELAY_S, STALL_S = 1.0, 3.0  # a sign of life is a write to a disk, which may be busy with what all other tests write
GROWS, SHRINKS, LED_AWAY, REPLACES = "3:3,30:4", "3:3,30:2-1", "3:3,30:2-0", "3:3,30:3-1"
WHO = {"leader": "gen=1:role=leader", "other": "gen=1:rank=2", "newcomer": "member=3", "leaver": "gen=1:rank=1"}
POINT = "point:kill:gen=1:rank=1:step=20;"
LOSS = "sum:kill:gen=1:rank=1:step=20;"


@dataclass(frozen=True)
class Cell:
    """A stage as a role passes it, and what the job does when a process is killed or stopped there.

    Attributes
    ----------
    lost : tuple of str
        What it may do: more than one thing where it depends on how far the others have come.
    more : str
        Further conditions of the fault.
    before : str
        A fault that has to happen before, so that the stage is passed at all.
    job : str
        "softmax", or "plate", which has a distributed array.
    quick : tuple of str
        Actions that are tested always.
    """

    stage: str
    role: str
    lost: tuple[str, ...]
    who: str = ""
    table: str = GROWS
    more: str = ""
    before: str = ""
    job: str = "softmax"
    quick: tuple[str, ...] = ()

    def fault(self, action: str) -> str:
        """Return the fault, as the job finds it in its environment."""
        action = f"{action}={DELAY_S}" if action == "delay" else action
        return f"{self.before}{self.stage}:{action}:{self.who or WHO[self.role]}{self.more}"


CELLS = (
    # Starting newcomers.
    Cell("request", "leader", (WENT_ON,)),
    Cell("start", "leader", (WENT_ON,)),
    Cell("warm", "newcomer", (DROPPED,), quick=("kill",)),
    Cell("spawn", "leader", (WENT_ON,)),
    Cell("init", "newcomer", (DROPPED,), quick=("kill",)),
    Cell("gather", "newcomer", (DROPPED,)),
    # The resize.
    Cell("drain", "leader", (WENT_ON,)),
    Cell("drain", "other", (WENT_ON, ROLLED_BACK)),
    Cell("merge", "leader", (ROLLED_BACK,), quick=("kill",)),
    Cell("merge", "other", (ROLLED_BACK,)),
    Cell("merge", "newcomer", (ROLLED_BACK,), quick=("stop",)),
    Cell("sync", "leader", (ROLLED_BACK,)),
    Cell("sync", "other", (ROLLED_BACK,)),
    Cell("sync", "newcomer", (ROLLED_BACK,)),
    Cell("redistribute", "leader", (ROLLED_BACK,)),
    Cell("redistribute", "other", (ROLLED_BACK,)),
    Cell("redistribute", "newcomer", (ROLLED_BACK,)),
    Cell("split", "leader", (ROLLED_BACK,), table=REPLACES),
    Cell("split", "other", (ROLLED_BACK,), table=REPLACES),
    Cell("split", "leaver", (ROLLED_BACK,), table=REPLACES),
    Cell("split", "newcomer", (ROLLED_BACK,), table=REPLACES),
    Cell("commit", "leader", (ROLLED_BACK,), quick=("kill",)),
    Cell("commit", "other", (ROLLED_BACK,)),
    Cell("commit", "newcomer", (ROLLED_BACK,)),
    Cell("retire", "leaver", (AS_EVER,), who="member=1", table=SHRINKS, quick=("kill",)),
    Cell("retire", "leader", (AS_EVER,), who="member=0", table=LED_AWAY),
    # Steps.
    Cell("point", "leader", (WENT_ON,), more=":step=20"),
    Cell("point", "other", (WENT_ON,), more=":step=20"),
    Cell("sum", "leader", (WENT_ON,), more=":step=20", quick=("stop", "delay")),
    Cell("sum", "other", (WENT_ON,), more=":step=20", quick=("kill",)),
    Cell("end", "leader", (WENT_ON,), who="role=leader"),
    Cell("end", "other", (WENT_ON,), who="rank=2"),
    # Losses.
    Cell("detect", "leader", (WENT_ON,), before=LOSS),
    Cell("detect", "other", (WENT_ON,), before=LOSS, quick=("kill",)),
    Cell("agree", "leader", (WENT_ON,), before=LOSS),
    Cell("agree", "other", (WENT_ON,), before=LOSS),
    Cell("rebuild", "leader", (WENT_ON, RESTARTED), before=LOSS),
    Cell("rebuild", "other", (WENT_ON, RESTARTED), before=LOSS),
    Cell(
        "restore", "leader", (RESTARTED,), who="role=leader", table="20:3", before="sum:kill:step=12:gen=0;", quick=("kill",)
    ),
    # Checkpoints.
    Cell("snapshot", "leader", (WENT_ON,)),
    Cell("snapshot", "other", (WENT_ON,)),
    Cell("write", "leader", (WENT_ON,), quick=("kill",)),
    Cell("manifest", "leader", (WENT_ON,)),
    # Copies in memory.
    Cell("copy", "leader", (BEGAN_AGAIN,), job="plate"),
    Cell("copy", "other", (BEGAN_AGAIN,), job="plate", quick=("kill",)),
    Cell("restore", "leader", (BEGAN_AGAIN,), who="role=leader", before=POINT, job="plate"),
    Cell("restore", "other", (BEGAN_AGAIN,), who="role=other", before=POINT, job="plate"),
)


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        full = metafunc.config.getoption("all_faults")
        chosen = [(cell, action) for cell in CELLS for action in (ACTIONS if full else cell.quick)]
        names = [f"{cell.stage}-{cell.role}-{action}" for cell, action in chosen]
        metafunc.parametrize(("cell", "action"), chosen, ids=names)


def test_every_stage_is_tested():
    assert {cell.stage for cell in CELLS} == set(STAGES)


@pytest.fixture(scope="module")
def scripts(shards):
    """The jobs, without their pauses."""
    return {"softmax": [SCRIPTS / "softmax.py", shards, EPOCHS, "--pause"], "plate": [SCRIPTS / "plate.py", SIZE, TURNS]}


@pytest.fixture(scope="module")
def static(scripts, tmp_path_factory):
    """What one static rank computes."""
    found = {}
    for name, script in scripts.items():
        folder = tmp_path_factory.mktemp(name)
        with Job(hpc_elastic("run", "--run-dir", "r", *script, 0), folder=folder) as job:
            done = job.wait()
        assert done.code == 0, done.err
        found[name] = done.value("sha256")
    return found


def test_fault(cell, action, scripts, static, tmp_path, record_property):
    run = tmp_path / "r"
    hold = (cell.stage, action) != ("retire", "stop")  # it would stand still for the leaver that is stopped
    settings = {"ledger": "true", "stall_s": STALL_S, "deadline_s": 20, "checkpoint_steps": 5}
    options = [
        *("--run-dir", "r", "--slots", 6, "--max", 4, "--timetable", cell.table),
        *(("--hold",) if hold else ()),
    ]
    options += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    script = [*scripts[cell.job], PAUSE_S if hold else 5 * PAUSE_S]
    with Job(hpc_elastic("run", *options, *script), folder=tmp_path, environ={FAULT_VARIABLE: cell.fault(action)}) as job:
        done = job.wait()
    assert done.code == 0, done.err
    assert "Assertion failed" not in done.err  # MPICH's
    happening = run / "faults" / ("1" if cell.before else "0")
    assert happening.exists(), "the stage was not passed"
    came, seconds = outcome(run), seconds_from(happening.stat().st_mtime, run)
    said = came if came == AS_EVER else f"{came}, {seconds:.2f} s"
    record_property(fault_table.PROPERTY, (cell.job, cell.stage, cell.role, action, said))
    assert done.value("sha256") == static[cell.job]
    if cell.job == "softmax":
        check_ledger(run, EPOCHS, SAMPLES)
    assert came in (cell.lost if action != "delay" else (outcome_of_delay(cell),)), done.err


def outcome_of_delay(cell):
    """Return what a delay leads to: nothing, but for what had to happen before."""
    if not cell.before:
        return AS_EVER
    return BEGAN_AGAIN if cell.job == "plate" else RESTARTED if cell.stage == "restore" else WENT_ON


def seconds_from(moment: float, run: Path) -> float:
    """Return how long after the `moment` of the fault the job went on."""
    kinds = (events.Lost, events.Refused, events.Resumed, events.Rewound)
    ends = [event.time for kind in kinds for event in happened(run, kind)]
    return min((end - moment for end in ends if end > moment), default=0.0)
