"""Results as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swin_dense.errors import ConfigError

Cell = float | int | str | None


def print_table(title: str, rows: Mapping[str, Cell | Mapping[str, Cell]]) -> None:
    """Print names with their values, or with several named values each, as `cell_text` shows them.

    Args:
        title: Above the table.
        rows: {name: value}, or {name: {column: value}} with the same columns everywhere.
    """
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()), None)
    columns = list(first) if isinstance(first, Mapping) else [""]
    table = Table(show_header=isinstance(first, Mapping))
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, value in rows.items():
        values = value.values() if isinstance(value, Mapping) else [value]
        table.add_row(name, *(cell_text(value) for value in values))
    console = Console(markup=False, emoji=False, highlight=False)  # names and paths may hold brackets and colons
    console.print(title, soft_wrap=True)
    console.print(table)


def cell_text(value: Cell) -> str:
    """A value as people read it: fractions with three digits, counts in groups of three, None as n/a."""
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def counted(count: int, one: str, many: str) -> str:
    """A count with its noun: "1 class", "80 classes"."""
    return f"{count:,} {one if count == 1 else many}"


def per_class_table(scores: Mapping[str, Any], columns: Sequence[str] = ()) -> dict[str, Mapping[str, float | None]]:
    """The scores of each class, all or those named; classes without ground truth are left out."""
    per_class = scores["per_class"]
    columns = columns or next((list(values) for values in per_class.values() if values), [])
    rows = {name: {column: (values or {}).get(column) for column in columns} for name, values in per_class.items()}
    return {name: row for name, row in rows.items() if any(value is not None for value in row.values())}


def print_sentences(sentences: Sequence[str]) -> None:
    """Print sentences, one below the other, as wide as the terminal."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    for sentence in sentences:
        console.print(sentence)


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold is done.

    Raises:
        ConfigError: The path is a folder, or its folder cannot be written to.
    """
    folder = next((parent for parent in path.absolute().parents if parent.exists()), path)
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path}: cannot be written; name a file in a folder that can.")


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a JSON file; nothing where the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
