"""Pages of HTML that need no other file: pictures and drawings lie inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from swin_dense.tools.tables import Cell, cell_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #232328; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 0.2em; } p { margin: 0.3em 0; }
table { border-collapse: collapse; margin: 0.5em 0; }
td, th { padding: 0.2em 1.2em 0.2em 0; text-align: left; vertical-align: top; font-weight: normal; }
th { color: #6a6a72; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.error { color: #b3141e; font-weight: 600; } .note { color: #6a6a72; }
.figures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0.6em 0; max-width: 880px; } figure img, figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 0.85em; max-width: 640px; overflow-wrap: anywhere; }
.bar { background: #cdd2da; height: 0.8em; }
"""


def write_html(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page, as `html_document` makes it; the file's folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_document(title, parts), encoding="utf-8")


def html_document(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: Above the page and in its tab; plain text.
        parts: Pieces of HTML, one below the other.
    """
    head = f'<head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(part for part in parts if part)])
    return f'<!doctype html>\n<html lang="en">{head}<body>\n{body}\n</body></html>\n'


def heading(text: str, anchor: str | None = None) -> str:
    """A heading of plain text, which `#anchor` leads to."""
    return f"<h2>{escape(text)}</h2>" if anchor is None else f'<h2 id="{escape(anchor)}">{escape(text)}</h2>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def html_table(rows: Mapping[str, Cell | Mapping[str, Cell]]) -> str:
    """A table of names with their values, or with several named values each.

    Args:
        rows: As in `tables.print_table`.
    """
    first = next(iter(rows.values()), None)
    columns = list(first) if isinstance(first, Mapping) else []
    header = "".join(f'<th class="number">{escape(column.replace("_", " "))}</th>' for column in columns)
    lines = [f"<tr><th></th>{header}</tr>"] if columns else []
    for name, value in rows.items():
        cells = value.values() if isinstance(value, Mapping) else [value]
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(map(_cell, cells))}</tr>")
    return f"<table>{''.join(lines)}</table>"


def figures(pictures: Sequence[str]) -> str:
    """Figures side by side, as far as the window is wide."""
    return f'<div class="figures">{"".join(pictures)}</div>' if pictures else ""


def figure(picture: np.ndarray | str | None, caption: str) -> str:
    """A picture with text below.

    Args:
        picture: (h, w, 3) uint8 RGB, or a drawing as SVG; None leaves the text alone.
        caption: HTML.
    """
    shown = f'<img alt="" src="{embedded(picture)}">' if isinstance(picture, np.ndarray) else picture or ""
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def embedded(picture: np.ndarray) -> str:
    """A picture, (h, w, 3) uint8 RGB, as an address that holds all of it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{cell_text(value)}</td>'
