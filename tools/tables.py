"""Results as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cell = float | int | str | None


def print_table(title: str, rows: Mapping[str, Cell | Mapping[str, Cell]]) -> None:
    """Print names with their values, or with several named values each.

    Fractions are printed with three digits, counts in groups of three, None as n/a.

    Args:
        title: Above the table.
        rows: {name: value}, or {name: {column: value}} with the same columns everywhere.
    """
    from rich.console import Console
    from rich.table import Table

    first = next(iter(rows.values()), None)
    columns = list(first) if isinstance(first, Mapping) else [""]
    table = Table()
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, value in rows.items():
        values = value.values() if isinstance(value, Mapping) else [value]
        table.add_row(name, *(_text(value) for value in values))
    console = Console(markup=False, emoji=False, highlight=False)  # names and paths may hold brackets and colons
    console.print(title, soft_wrap=True)
    console.print(table)


def _text(value: Cell) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def per_class_table(scores: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """The scores of each class; one without ground truth has n/a everywhere."""
    per_class = scores["per_class"]
    columns = next((list(values) for values in per_class.values() if values), [])
    return {name: values or dict.fromkeys(columns) for name, values in per_class.items()}


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a JSON file; nothing where the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
