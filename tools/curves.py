"""The picture of a run: losses and scores over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the rows of metrics.csv: losses on the left, validation scores on the right.

    Args:
        rows: As `read_metrics` gives them; columns beginning with "loss" and with "val" are drawn.
        path: The PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    panels = (("loss", "training loss", "loss"), ("val", "validation score", "score, fraction of 1"))
    for axes, (prefix, title, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in columns:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if name.startswith(prefix):
                label = name.removeprefix("val_").replace("_", " ")
                axes.plot(*zip(*points, strict=True), label=label, marker="." if prefix == "val" else None)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
