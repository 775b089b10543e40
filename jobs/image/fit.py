"""The same classifier as `jobs.image.train`, and its options, by Keras's own `fit` instead of a loop.

hpc-elastic run --slots 4 --timetable 40:3,120:2-0 -m jobs.image.fit --data fashion --task classes --model cnn --epochs 3
"""

from __future__ import annotations

import numpy as np

import hpc_elastic as he

from .prepare import CLASSES, UPRIGHT, prepare
from .train import build, keras, parse, report


def train(job: he.Job) -> None:
    """Train, then predict held-back images."""
    settings = parse()
    folder = settings.folder / f"{settings.data}-{settings.task}"
    names = UPRIGHT if settings.task == "upright" else CLASSES[settings.data]
    model = build(settings.model, settings.hidden, len(names))
    model.compile(
        keras.optimizers.Adam(settings.rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    elastic = he.keras.Elasticity(job)
    with he.open_shards(folder / "train") as shards, he.open_shards(folder / "test") as held_back:
        samples, test = he.keras.data(shards, settings.batch), he.keras.data(held_back, 1024)
        model.fit(samples, epochs=settings.epochs, validation_data=test, callbacks=[elastic], verbose=2)
        scores = model.predict(test, callbacks=[elastic], verbose=0)  # by all ranks, each image once
        labels = held_back.gather(np.arange(len(held_back)))["label"]
    if job.leads:
        report(scores, labels, names)
        print(f"sha256     {he.keras.weights_sha256(model.get_weights())}", flush=True)


if __name__ == "__main__":
    given = parse()
    prepare(given.data, given.task, given.folder / f"{given.data}-{given.task}")
    he.run(train)
