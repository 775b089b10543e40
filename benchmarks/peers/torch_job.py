"""The job with torchrun, along its tutorial: DistributedDataParallel, DistributedSampler, and a snapshot every ten steps."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, TensorDataset

from benchmarks.peers.common import BATCH, EVERY, HIDDEN, RATE, SEED, Ledger, Settings

torch.set_num_threads(1)


class Trainer:
    """The model, and where it is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.snapshot: Path = settings.folder / "snapshot.pt"
        torch.manual_seed(SEED)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE)
        self.epoch = self.batch = 0
        if self.snapshot.exists():
            found = torch.load(self.snapshot)
            self.model.load_state_dict(found["model"])
            self.optimizer.load_state_dict(found["optimizer"])
            self.epoch, self.batch = found["epoch"], found["batch"]

    def save(self) -> None:
        """Write a snapshot, whole or not at all."""
        beside = self.snapshot.with_suffix(".new")
        where = {"epoch": self.epoch, "batch": self.batch}
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **where}, beside)
        beside.replace(self.snapshot)

    def train(self) -> None:
        """Train from there."""
        images, labels = (torch.from_numpy(np.array(each)) for each in self.settings.images("train"))
        stamps, ledger = self.settings.stamps(), Ledger(self.settings.folder)
        model, loss_of = DistributedDataParallel(self.model), nn.CrossEntropyLoss()
        begun = [time.time_ns() // 1000]
        dist.broadcast_object_list(begun)
        size, per_epoch = dist.get_world_size(), -(-len(images) // BATCH)
        sampler = DistributedSampler(TensorDataset(images, labels), seed=SEED)
        while self.epoch < self.settings.epochs:
            sampler.set_epoch(self.epoch)
            order = np.fromiter(sampler, np.int64)
            while self.batch < per_epoch:
                own = order[self.batch * BATCH // size : (self.batch + 1) * BATCH // size]
                step = self.epoch * per_epoch + self.batch
                ledger.write(self.epoch, step, begun[0], own)
                self.optimizer.zero_grad()
                loss_of(model(images[own].float() / 255), labels[own]).backward()
                self.optimizer.step()
                stamps.finished(step, size)
                self.settings.pause()
                self.batch += 1
                if self.batch % EVERY == 0 and dist.get_rank() == 0:
                    self.save()
            self.epoch, self.batch = self.epoch + 1, 0

    def test(self) -> float:
        """Return the accuracy on the held-back images."""
        images, labels = self.settings.images("test")
        with torch.no_grad():
            found = self.model(torch.from_numpy(np.array(images)).float() / 255)
        return float(np.mean(found.argmax(dim=1).numpy() == labels))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    trainer = Trainer(Settings())
    trainer.train()
    if dist.get_rank() == 0:
        trainer.settings.result(trainer.test())
    dist.destroy_process_group()
