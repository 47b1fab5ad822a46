"""report.html: a run as one page that people look at.

It is made from what lies in the run's folder: recipe.yaml, metrics.csv, curves.png, scores.json, environment.json,
plan.json, events.jsonl and pictures/.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from swin_dense.tools.html_page import Cell, figure, figures, heading, html_document, html_table, paragraph
from swin_dense.tools.tables import per_class_table
from swin_dense.training.atomic_file import atomic_write
from swin_dense.training.metrics_file import read_metrics
from swin_dense.training.progress import duration

if TYPE_CHECKING:
    from swin_dense.tools.run_folder import RunFolder

_SHOWN_EVENTS = 30
_MOST_CLASSES = 24


def write_report(folder: RunFolder) -> None:
    """Write the page of a run, whatever of it is there already; it needs no other file.

    Args:
        folder: The run's folder.
    """
    rows = read_metrics(folder.metrics) if folder.metrics.exists() else []
    scores, plan = _json(folder.scores), _json(folder.plan)
    environment = _json(folder.environment)
    parts = [
        *_progress(rows, environment),
        *_scores(scores),
        _curves(folder.curves),
        *_mistakes(scores),
        *_pictures("Worst validation images", "Most mistakes first; ground truth on the left.", folder.worst_pictures),
        *_pictures("Validation images", "Spread over the set; ground truth on the left.", folder.pictures),
        *_pictures("What the model was trained on", "The first batches after augmentation.", folder.training_pictures),
        *_plan(plan, rows),
        *_events(folder.events),
        *_environment(environment),
        *_recipe(folder.recipe),
    ]
    with atomic_write(folder.report) as file:
        file.write(html_document(f"{folder.path.resolve().name}: {_title(scores)}", parts).encode())


def _title(scores: Mapping[str, Any]) -> str:
    return f"after {scores['step']:,} steps" if "step" in scores else "not yet evaluated"


def _progress(rows: Sequence[Mapping[str, float]], environment: Mapping[str, Any]) -> list[str]:
    if not rows:
        return [paragraph("No step has been logged yet.")]
    step, total = int(rows[-1]["step"]), environment.get("total_steps")
    state = f"Step {step:,}" if total is None else f"Step {step:,} of {total:,}"
    seconds = _medians(rows, "step_time_s")
    pace = "" if seconds is None else f", {seconds:.2f} s a step, {duration(seconds * step)} of training"
    return [paragraph(f"{state}{pace}.")]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    if not scores:
        return []
    table: dict[str, Cell] = {name: value for name, value in scores.get("table", {}).items()}
    explained = [paragraph(sentence) for sentence in scores.get("explanations", ())]
    parts = [heading("Scores"), html_table(table), *explained]
    if scores.get("per_class"):
        parts += [heading("By class"), html_table(per_class_table(scores))]
    return parts


def _mistakes(scores: Mapping[str, Any]) -> list[str]:
    """Kinds of errors of a detector, and which class is taken for which."""
    errors = scores.get("errors")
    names = list(scores.get("per_class", ()))
    if errors is None:
        return _confusion(names, scores.get("confusion", ()), "pixels")
    best, per_class = errors["best"], errors["per_class"]
    at = "all scores" if best["score_threshold"] is None else f"scores from {best['score_threshold']:.3f} on"
    f1 = "" if best["F1"] is None else f", where F1 is best ({best['F1']:.3f})"
    total = {
        column: sum(of_class[column] for of_class in per_class.values()) for column in next(iter(per_class.values()))
    }
    return [
        heading("Kinds of errors"),
        paragraph(f"Detections with {at}{f1}."),
        html_table({"all": total, **{name: counts for name, counts in per_class.items() if any(counts.values())}}),
        *_confusion([*names, "background"], errors["confusion"], "objects and detections"),
    ]


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]], what: str) -> list[str]:
    if not counts or len(names) > _MOST_CLASSES:
        return []
    header = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = max(1, sum(row))
        cells = (
            f'<td class="number" style="background: rgb(70 110 190 / {count / total:.2f})">{count:,}</td>'
            for count in row
        )
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    text = f"Rows: what is there; columns: what was predicted; {what}."
    return [heading("Confusion"), paragraph(text), f"<table><tr><th></th>{header}</tr>{''.join(rows)}</table>"]


def _curves(path: Path) -> str:
    return figure(np.asarray(Image.open(path).convert("RGB")), "") if path.exists() else ""


def _pictures(title: str, text: str, folder: Path) -> list[str]:
    shown = [
        figure(np.asarray(Image.open(path).convert("RGB")), escape(path.stem))
        for path in (sorted(folder.glob("*.png")) if folder.is_dir() else ())
    ]
    return [heading(title), paragraph(text), figures(shown)] if shown else []


def _plan(plan: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> list[str]:
    """What `swin-dense plan` foresaw beside what was measured since."""
    measured: dict[str, Cell] = {
        "seconds a step": _medians(rows, "step_time_s"),
        "of it waiting for data, s": _medians(rows, "data_time_s"),
        "peak memory, GB": max((row["peak_memory_gb"] for row in rows if "peak_memory_gb" in row), default=None),
    }
    foreseen: dict[str, Cell] = {
        "seconds a step": plan.get("step_time_s"),
        "of it waiting for data, s": None,
        "peak memory, GB": plan.get("peak_memory_gb"),
    }
    table: dict[str, Mapping[str, Cell]] = {
        name: {"planned": foreseen[name], "measured": measured[name]} for name in measured
    }
    return [heading("Plan and measurement"), html_table(table)] if rows else []


def _events(path: Path) -> list[str]:
    if not path.exists():
        return []
    events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    if not events:
        return []
    counts = ", ".join(
        f"{count} {kind.replace('_', ' ')}" for kind, count in Counter(e["kind"] for e in events).items()
    )
    shown = "" if len(events) <= _SHOWN_EVENTS else f"; the last {_SHOWN_EVENTS} are shown"
    texts = [paragraph(event["text"]) for event in events[-_SHOWN_EVENTS:]]
    return [heading("What happened"), paragraph(f"{counts}{shown}."), *texts]


def _environment(environment: Mapping[str, Any]) -> list[str]:
    flat = {**environment, **environment.get("machine", {})}
    rows: dict[str, Cell] = {name.replace("_", " "): value for name, value in flat.items() if name != "machine"}
    return [heading("Environment"), html_table(rows)] if rows else []


def _recipe(path: Path) -> list[str]:
    return [heading("Recipe"), f"<pre>{escape(path.read_text())}</pre>"] if path.exists() else []


def _medians(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
