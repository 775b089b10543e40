"""A job that `hpc-elastic submit` wrote, and that goes on in another one after its time limit."""

from __future__ import annotations

from hpc_elastic import events

from ..afterwards import happened
from ..launch import ROOT, SCRIPTS, hpc_elastic
from .test_broker import BATCH, Elastic, computed, until

EPOCHS = 20


class Submitted(Elastic):
    """One by the batch script of `hpc-elastic submit`."""

    def submit(self, *options, epochs=EPOCHS, pause_s=0.3):
        self.epochs = epochs
        self.out = self.path.with_name(self.path.name + ".out")
        pairs = [word for each in ("ledger=true", "checkpoint_steps=50") for word in ("--set", each)]
        script = [SCRIPTS / "softmax.py", self.folder, epochs, "--batch", BATCH, "--until", self.enough, "--pause", pause_s]
        command = hpc_elastic("submit", "--run-dir", self.path, *pairs, *options, "--", *script)
        said = self.cluster.run(["env", "-C", self.folder, f"PYTHONPATH={ROOT}", *command]).stdout
        self.number = said.split("submitted as job ")[1].split(";")[0]


def test_goes_on_after_its_time_limit(cluster, tmp_path):
    """The signal that comes before the limit is sent by hand: Slurm may send it a minute sooner than it was asked to."""
    (tmp_path / "static").mkdir()
    static = computed(cluster, tmp_path / "static", EPOCHS)
    job = Submitted(cluster, tmp_path)
    job.submit("--time", "10")
    job.ranks(4)
    before = job.run.status().step
    cluster.run(["scancel", "--batch", "--signal=TERM", job.number])
    until(lambda: job.states("--job", job.number)[0] in ("PENDING", "REQUEUED", "REQUEUE_HOLD"))
    until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(job.companions()), 20)
    assert job.run.status().state == "stopped"
    assert job.run.status().step >= before
    # Slurm has a job that was requeued wait for two minutes.
    until(lambda: cluster.run(["scontrol", "update", f"JobId={job.number}", "StartTime=now"], check=False).returncode == 0)
    until(lambda: happened(job.path, events.Resumed))
    job.ranks(4)
    job.ended_well(static)
    assert len(happened(job.path, events.Started)) == 2
    assert happened(job.path, events.Resumed)[-1].step >= before
