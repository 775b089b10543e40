"""The picture of a run, in one SVG file: its learning curve by step, and its ranks by time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .course import Change, Value, whole
from .errors import ConfigError, RunDirectoryError
from .events import Started, read

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .rundir import RunDirectory

WIDTH, CURVE_HEIGHT, RANKS_HEIGHT = 9.0, 2.2, 2.0  # inches
COLOURS = ("#1f5fa8", "#d9822b", "#3a8f5c", "#8a5fb0")
DECADES = 30  # a loss that has fallen by more is drawn by its logarithm
SVG_DPI = 72  # what an SVG is drawn with
INK, FAINT = "#333333", "#d8d8d8"
# What happened: colour, and the marker in the ranks' panel.
MARKS = {
    "expand": ("#3a8f5c", "^"),
    "shrink": ("#1f5fa8", "v"),
    "loss": ("#c0392b", "X"),
    "rewind": ("#d9822b", "<"),
    "restart": ("#8a5fb0", "s"),
    "failure": ("#c0392b", "D"),
}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: sharp, small, and can be searched
    "svg.hashsalt": "hpc_elastic",  # the same run, the same file
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(run: RunDirectory, path: Path) -> None:
    """Draw what happened in `run` so far, into the SVG file `path`.

    Raises
    ------
    RunDirectoryError
        If nothing has happened that could be drawn, or the events are damaged.
    ConfigError
        If matplotlib is missing, or the file can't be written.
    """
    happened = read(run.events)
    course = whole(happened)
    if not any(entry.step for entry in course):
        raise RunDirectoryError(f"{run.path} has done no step that could be drawn yet: see `hpc-elastic status {run.path}`")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'hpc_elastic[pictures]'") from error
    with mpl.rc_context(STYLE):
        script = next((event.script for event in happened if isinstance(event, Started)), "")
        figure = _figure(f"{script}, {run.path.name}", course)
        # Laid out as for pixels: the SVG renderer takes text for narrower than it is drawn, and cuts labels off.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {error.strerror}") from error


def _figure(title: str, course: Sequence[Value | Change]) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no display, and nothing global

    changes = [entry for entry in course if isinstance(entry, Change)]
    values = [entry for entry in course if isinstance(entry, Value)]
    families = _families(values)
    heights = [CURVE_HEIGHT] * len(families) + [RANKS_HEIGHT]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), dpi=SVG_DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    last = max(entry.step for entry in course)
    for index, (ax, family) in enumerate(zip(axes, families, strict=False)):
        _curve(ax, values, family)
        _lines(ax, changes)
        ax.set_xlim(0, last)
        _grid(ax)
        if index == 0:
            _epochs(ax, values)
        if index == len(families) - 1:
            ax.set_xlabel("step")
        else:
            ax.tick_params(labelbottom=False)
    _ranks(axes[-1], changes, max(entry.time for entry in course))
    return figure


def _families(values: Sequence[Value]) -> list[list[str]]:
    """Return the names of the metrics, a list for each panel: a metric and its validation share one."""
    names = dict.fromkeys(name for value in values for name in value.metrics)
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.removeprefix("val_"), []).append(name)
    return [families[base] for base in sorted(families, key=lambda base: "loss" not in base)]


def _curve(ax: Axes, values: Sequence[Value], family: Sequence[str]) -> None:
    """Draw each metric of a family: thin as it was measured, and dots for the means of epochs."""
    for name, colour in zip(family, COLOURS * (len(family) // len(COLOURS) + 1), strict=False):
        own = [value for value in values if name in value.metrics]
        measured = [value for value in own if value.epoch is None]
        epochs = [value for value in own if value.epoch is not None]
        validates = name.startswith("val_")
        ax.plot(
            *_points(measured, name), color=colour, linewidth=1.2, marker="o" if validates else "", markersize=4, label=name
        )
        if epochs and measured:
            ax.plot(
                *_points(epochs, name), "o", color=colour, markersize=4, clip_on=False, label=f"{name}, mean of an epoch"
            )
        elif epochs:
            ax.lines[-1].set_label("_")
            ax.plot(*_points(epochs, name), "o-", color=colour, markersize=4, label=f"{name}, mean of an epoch")
    name = family[0].removeprefix("val_")
    ax.set_ylabel(name)
    numbers = [value.metrics[each] for value in values for each in family if each in value.metrics]
    finite = [number for number in numbers if math.isfinite(number)]
    if "loss" in name and finite and 0 < min(finite) * DECADES < max(finite):
        ax.set_yscale("log")
    ax.legend(frameon=False, fontsize=9)


def _points(values: Sequence[Value], name: str) -> tuple[list[int], list[float]]:
    return [value.step for value in values], [value.metrics[name] for value in values]


def _lines(ax: Axes, changes: Sequence[Change]) -> None:
    for change in changes:
        if change.what in MARKS:
            ax.axvline(change.step, color=MARKS[change.what][0], linewidth=0.9, linestyle=":", zorder=1)


def _grid(ax: Axes) -> None:
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


def _epochs(ax: Axes, values: Sequence[Value]) -> None:
    """Mark the ends of epochs above the panel, ten at most."""
    ends = {value.epoch + 1: value.step for value in values if value.epoch is not None}
    if not ends:
        return
    every = -(-len(ends) // 10)
    shown = {number: step for number, step in ends.items() if number % every == 0}
    top = ax.secondary_xaxis("top")
    top.set_xticks(list(shown.values()), [str(number) for number in shown])
    top.set_xlabel("epoch")
    top.spines["top"].set_visible(False)


def _ranks(ax: Axes, changes: Sequence[Change], end: float) -> None:
    """Draw the number of ranks by time, and mark what changed it."""
    from matplotlib.ticker import MaxNLocator

    began = changes[0].time
    times = [change.time - began for change in changes] + [end - began]
    ranks = [change.ranks for change in changes]
    ax.fill_between(times, [*ranks, ranks[-1]], step="post", color=COLOURS[0], alpha=0.18, linewidth=0)
    ax.step(times, [*ranks, ranks[-1]], where="post", color=COLOURS[0], linewidth=1.4)
    for what, (colour, marker) in MARKS.items():
        own = [change for change in changes if change.what == what]
        if own:
            x, y = [change.time - began for change in own], [change.ranks for change in own]
            ax.plot(x, y, marker, color=colour, markersize=8, label=what, zorder=3, clip_on=False)
    ax.set_xlim(0, times[-1] or 1)
    ax.set_ylim(0, max(ranks) + 0.4)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    ax.set_xlabel("time in s")
    ax.set_ylabel("ranks")
    _grid(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9, ncols=len(MARKS), loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
