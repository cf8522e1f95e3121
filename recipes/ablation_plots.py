"""Pictures of a grid: the scores of every run, and how often signs flip while the methods train."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ablation_tables import Row, by_seed
from matplotlib import colormaps
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LogHistory = Sequence[Mapping[str, float]]
COLUMNS = 3  # panels beside each other


def plot_scores(path: Path, rows: Sequence[Row], tasks: Sequence[str], methods: Sequence[str]) -> None:
    """One panel for each task: a line of dots for each method, its mean, and the teacher."""
    height = 1.4 + 0.32 * len(methods)
    figure, panels = _panels(len(tasks), height, sharey=True)
    for axis, task in zip(panels, tasks, strict=False):
        here = [row for row in rows if row.task == task]
        for place, method in enumerate(methods):
            scores = list(by_seed(here, task, method, "score").values())
            if scores:
                axis.plot(scores, [place] * len(scores), "o", color=_color(place), alpha=0.6, markeredgewidth=0)
                axis.vlines(statistics.mean(scores), place - 0.3, place + 0.3, color="black", linewidth=2)
        if here:
            axis.axvline(here[0].teacher, linestyle=":", color="grey")
        axis.set(title=task, xlabel=here[0].metric.replace("_", " ") if here else "")
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)  # the first on top
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("packed students: a dot each seed, a bar their mean; dotted: the float teacher", fontsize="medium")
    figure.savefig(path, dpi=110)


def plot_flips(
    path: Path,
    histories: Mapping[tuple[str, str], Sequence[LogHistory]],
    tasks: Sequence[str],
    methods: Sequence[str],
) -> None:
    """One panel for each task: the share of weights that flip in a step, over the steps, mean over seeds.

    Args:
        path: PNG file to write.
        histories: The logs of all seeds by task and method.
        tasks: The panels.
        methods: The lines.
    """
    figure, panels = _panels(len(tasks), 3.6)
    for axis, task in zip(panels, tasks, strict=False):
        curves = {method: mean_curve(histories.get((task, method), ())) for method in methods}
        for place, (method, (steps, ratios)) in enumerate(curves.items()):
            start = next((index for index, ratio in enumerate(ratios) if ratio), 0)  # step 1 has learning rate 0
            axis.plot(steps[start:], ratios[start:], color=_color(place), linewidth=1.8, label=method)
        positive = [ratio for _, ratios in curves.values() for ratio in ratios if ratio > 0]
        axis.set_yscale("symlog", linthresh=min(positive, default=1e-9))  # a rule may freeze all signs: zero
        axis.set_ylim(bottom=0)
        axis.set(title=task, xlabel="step")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("weights that flip in a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(path, dpi=110)


def mean_curve(histories: Sequence[LogHistory]) -> tuple[list[int], list[float]]:
    """Steps and flip ratio, mean over the runs, at the steps that all of them logged."""
    runs = [{log["step"]: log["flip_ratio"] for log in history if "flip_ratio" in log} for history in histories]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return steps, [statistics.mean(run[step] for run in runs) for step in steps]


def _panels(count: int, height: float, **sharing: bool) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    lines = -(-count // columns)
    figure = Figure(figsize=(3 + 3.4 * columns, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, **sharing).flat)
    for axis in panels[count:]:
        axis.remove()
    return figure, panels[:count]


def _color(place: int) -> tuple[float, ...]:
    """Of a method, the same in all pictures."""
    return (*colormaps["tab10"].colors, *colormaps["Dark2"].colors)[place % 18]
