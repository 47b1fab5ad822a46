"""Pages of Markdown that hold figures, for `docs/`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

_WIDTH = 120


def write_markdown(path: Path, page: str) -> None:
    """Write a page, whole or not at all; its folder is created."""
    from swin_dense.training.atomic_file import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(page.encode())


def markdown_page(title: str, parts: Sequence[str]) -> str:
    """A page of a title and paragraphs, tables or lists, an empty line between them."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 120 characters; words stay whole."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def markdown_list(sentences: Sequence[str]) -> str:
    """A list, an item for each sentence."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def markdown_table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """A table of names, each with the same named values."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---", *["---:"] * len(columns)], *([name, *row.values()] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_markdown_table(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of `markdown_table` in a text; none where there is no table."""
    table = next((part for part in text.split("\n\n") if part.startswith("| ")), "")
    lines = [line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()]
    return {name: dict(zip(lines[0][1:], values, strict=False)) for name, *values in lines[2:]}
