"""Reads TensorBoard's logs back, with what TensorBoard itself reads them with."""

from __future__ import annotations

import sys
import types


def scalars(folder):
    """Return the steps and values in the logs in `folder` by tag, as TensorBoard shows them."""
    # TensorBoard would import all of TensorFlow, only to open files, unless this module of its own exists.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
