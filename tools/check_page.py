"""The data check as one page of HTML: counts, and for each kind the first findings with what is wrong drawn in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.datasets.check_findings import KINDS, Finding, Report, printable
from swin_dense.tools.html_page import figure, figures, heading, paragraph, write_html
from swin_dense.tools.tables import counted

_PER_KIND = 6


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
        paragraph(f"{counted(report.num_errors, 'error', 'errors')}, {counted(report.num_notes, 'note', 'notes')}"),
        *(paragraph(printable(remark)) for remark in report.remarks),
        _overview(counts),
        *(_section(kind, count, report, draw) for kind, count in counts.items()),
        *(_statistics(name, statistics) for name, statistics in report.statistics.items()),
    ]
    write_html(path, printable(title), parts)


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
        f'<td class="number">{count:,}</td><td>{_text(KINDS[kind].meaning)}</td></tr>'
        for kind, count in counts.items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else paragraph("Nothing was found.")


def _section(kind: str, count: int, report: Report, draw: Callable[[Finding], np.ndarray | None]) -> str:
    about = KINDS[kind]
    shown = examples(report, kind)
    more = f" The first {len(shown)} are shown." if count > len(shown) == _PER_KIND else ""
    return (
        heading(f"{kind}: {count:,} ({about.severity})", kind)
        + paragraph(printable(f"{about.meaning}.{more} In a cleaned copy: {about.cleaned}."))
        + figures([figure(draw(finding), _caption(finding)) for finding in shown])
    )


def _caption(finding: Finding) -> str:
    ids = [("image", finding.image_id), ("annotation", finding.annotation_id)]
    where = [f"{name} id {value}" for name, value in ids if value is not None]
    return f"<b>{_text(Path(finding.file).name)}</b> {_text(', '.join(where))}<br>{_text(finding.reason)}"


def _statistics(name: str, statistics: Mapping[str, Any]) -> str:
    histograms = [
        _histogram(title, statistics[title]) for title in ("sizes", "classes", "values") if statistics.get(title)
    ]
    crowd = statistics.get("crowd")
    share = "" if crowd is None else paragraph(f"crowd: {crowd['share_of_annotations']:.1%} of the annotations")
    return heading(printable(f"{name}: {statistics['images']:,} images")) + share + "".join(histograms)


def _histogram(title: str, counts: Mapping[str, int]) -> str:
    largest = max(1, *counts.values())
    rows = [
        f'<tr><td>{_text(name)}</td><td class="number">{count:,}</td>'
        f'<td><div class="bar" style="width: {300 * count / largest:.0f}px"></div></td></tr>'
        for name, count in counts.items()
    ]
    return f"{paragraph(title)}<table>{''.join(rows)}</table>"


def _text(value: str) -> str:
    return escape(printable(value))
