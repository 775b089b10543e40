"""The same classifier as `jobs.image.train`, and its options, by Keras's own `fit` instead of a loop.

hpc-elastic run --slots 4 --timetable 40:3,120:2-0 -m jobs.image.fit --data fashion --task classes --model cnn --epochs 3
"""

from __future__ import annotations

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
    with he.open_shards(folder / "train") as shards:
        samples = he.keras.data(shards, settings.batch)
        model.fit(samples, epochs=settings.epochs, callbacks=[he.keras.Elasticity(job)], verbose=2)
    if job.leads:
        report(model, folder / "test", names)


if __name__ == "__main__":
    given = parse()
    prepare(given.data, given.task, given.folder / f"{given.data}-{given.task}")
    he.run(train)
