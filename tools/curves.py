"""The picture of a run: losses and scores over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the rows of metrics.csv: losses on the left, validation scores on the right.

    Args:
        rows: As `read_metrics` gives them. Drawn are columns that begin with "loss", with "val_loss", dashed and in the
            colour of the same training loss, and with "val" otherwise.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for name in dict.fromkeys(name for row in rows for name in row):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if name.startswith("loss"):
            losses.plot(*zip(*points, strict=True), label=_label(name))
        elif name.startswith("val_loss"):
            _draw_validation_loss(losses, name.removeprefix("val_"), points)
        elif name.startswith("val"):
            scores.plot(*zip(*points, strict=True), marker=".", label=_label(name.removeprefix("val_")))
    for axes, title, unit in ((losses, "loss", "loss"), (scores, "validation score", "score, fraction of 1")):
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_validation_loss(axes: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    colours = [line.get_color() for line in axes.get_lines() if line.get_label() == _label(name)]
    hidden = "" if name == "loss" else "_"  # the legend shows the sum alone: colours tell the others
    colour = colours[0] if colours else None
    axes.plot(*zip(*points, strict=True), "--", marker=".", label=f"{hidden}validation {_label(name)}", color=colour)


def _label(column: str) -> str:
    return column.replace("_", " ")
