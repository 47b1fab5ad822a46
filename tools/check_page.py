"""The data check as one page of HTML: counts, and for each kind the first findings with what is wrong drawn in."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from swin_dense.datasets.check_findings import KINDS, Finding, Report, printable

_PER_KIND = 6
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #232328; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 0.2em; } p { margin: 0.3em 0; }
table { border-collapse: collapse; } td, th { padding: 0.2em 0.8em 0.2em 0; text-align: left; vertical-align: top; }
td.count { text-align: right; } .error { color: #b3141e; font-weight: 600; } .note { color: #6a6a72; }
.examples { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0.6em 0; max-width: 880px; } 
figcaption { font-size: 0.85em; max-width: 420px; overflow-wrap: anywhere; }
.bar { background: #cdd2da; height: 0.8em; }
"""


def write_page(path: Path, title: str, report: Report, draw: Callable[[Finding], np.ndarray | None]) -> None:
    """Writes the page; it needs no other file.

    Args:
        path: The file to write.
        title: Names the data.
        report: What was found.
        draw: The picture of a finding, (h, w, 3) uint8 RGB, or None.
    """
    counts = report.counts()
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style></head>',
        "<body>",
        f"<h1>{_text(title)}</h1>",
        f"<p>{report.num_errors:,} errors, {report.num_notes:,} notes</p>",
        *(f"<p>{_text(remark)}</p>" for remark in report.remarks),
        _overview(counts),
        *(_section(kind, count, report, draw) for kind, count in counts.items()),
        *(_statistics(name, statistics) for name, statistics in report.statistics.items()),
        "</body></html>",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def examples(report: Report, kind: str) -> list[Finding]:
    """The findings of a kind to show: the first ones, of different pictures as far as there are any."""
    found = [finding for finding in report.findings if finding.kind == kind]
    first_of = {
        (finding.split, finding.file if finding.entry is None else finding.image_id): finding for finding in found[::-1]
    }
    chosen = list(first_of.values())[::-1][:_PER_KIND]
    return chosen + [finding for finding in found if finding not in chosen][: _PER_KIND - len(chosen)]


def _overview(counts: Mapping[str, int]) -> str:
    rows = [
        f'<tr><td class="{KINDS[kind].severity}">{KINDS[kind].severity}</td><td><a href="#{kind}">{kind}</a></td>'
        f'<td class="count">{count:,}</td><td>{_text(KINDS[kind].meaning)}</td></tr>'
        for kind, count in counts.items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else "<p>Nothing was found.</p>"


def _section(kind: str, count: int, report: Report, draw: Callable[[Finding], np.ndarray | None]) -> str:
    severity = KINDS[kind].severity
    figures = [_figure(finding, draw(finding)) for finding in examples(report, kind)]
    more = f" The first {len(figures)} are shown." if count > len(figures) and len(figures) == _PER_KIND else ""
    return (
        f'<h2 id="{kind}">{kind}: {count:,} <span class="{severity}">{severity}</span></h2>'
        f"<p>{_text(KINDS[kind].meaning)}.{more} <i>In a cleaned copy: {_text(KINDS[kind].cleaned)}.</i></p>"
        f'<div class="examples">{"".join(figures)}</div>'
    )


def _figure(finding: Finding, picture: np.ndarray | None) -> str:
    ids = [("image", finding.image_id), ("annotation", finding.annotation_id)]
    where = [f"{name} id {value}" for name, value in ids if value is not None]
    caption = f"<b>{_text(Path(finding.file).name)}</b> {_text(', '.join(where))}<br>{_text(finding.reason)}"
    shown = "" if picture is None else f'<img alt="" src="{_embedded(picture)}"><br>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _embedded(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _statistics(name: str, statistics: Mapping[str, Any]) -> str:
    histograms = [
        _histogram(title, statistics[title]) for title in ("sizes", "classes", "values") if statistics.get(title)
    ]
    return f"<h2>{_text(name)}: {statistics['images']:,} images</h2>{''.join(histograms)}"


def _histogram(title: str, counts: Mapping[str, int]) -> str:
    largest = max(1, *counts.values())
    rows: Sequence[str] = [
        f'<tr><td>{_text(name)}</td><td class="count">{count:,}</td>'
        f'<td><div class="bar" style="width: {300 * count / largest:.0f}px"></div></td></tr>'
        for name, count in counts.items()
    ]
    return f"<p>{title}</p><table>{''.join(rows)}</table>"


def _text(value: str) -> str:
    return escape(printable(value))
