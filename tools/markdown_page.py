"""Pages of Markdown that hold figures, for `docs/`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

_WIDTH = 120


def write_markdown(path: Path, page: str) -> None:
    """Write a page; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def markdown_page(title: str, parts: Sequence[str]) -> str:
    """A page of a title and paragraphs, tables or lists, an empty line between them."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 120 characters; words stay whole."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def markdown_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table of names, each with the same named values."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---", *["---:"] * len(columns)], *([name, *row.values()] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
