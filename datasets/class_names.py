"""Reading the names of the classes from a text file or a table."""

from __future__ import annotations

import csv
from pathlib import Path

from swin_dense.errors import DataError

_NAME_COLUMNS = ("name", "names", "class", "label")


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Reads the names of the classes, in order.

    Args:
        path: a text file with one name per line, or a CSV file with a header that has the column "Name", like ADE20K's
            objectInfo150.csv. Of synonyms separated by ";" the first is taken; where two classes would then be called
            the same, words are added until they differ.

    Raises:
        DataError: the file is missing, empty, no text, or names a class twice.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the list of class names cannot be read ({error}).") from None
    header = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    column = next((header.index(name) for name in _NAME_COLUMNS if name in header and len(header) > 1), None)
    if column is None:
        names = tuple(line.strip() for line in lines)
    else:
        rows = list(csv.reader(lines[1:]))
        short = next((number for number, row in enumerate(rows, start=2) if len(row) <= column), None)
        if short is not None:
            raise DataError(f"{path}: line {short} has no column {lines[0].split(',')[column]!r}. Complete it.")
        names = _tell_apart([[word.strip() for word in row[column].split(";")] for row in rows])
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not names or repeated is not None:
        got = "none" if not names else f"{repeated!r} twice"
        raise DataError(f"{path}: wanted one different class name per line, got {got}.")
    return names


def numbered_names(count: int) -> tuple[str, ...]:
    """Returns names for classes of which only the number is known: "class 0", "class 1" and so on."""
    return tuple(f"class {number}" for number in range(count))


def _tell_apart(synonyms: list[list[str]]) -> tuple[str, ...]:
    lengths = [1] * len(synonyms)
    while True:
        names = [" ".join(words[:length]) for words, length in zip(synonyms, lengths, strict=True)]
        longer = [
            length + 1 if names.count(name) > 1 and length < len(words) else length
            for name, words, length in zip(names, synonyms, lengths, strict=True)
        ]
        if longer == lengths:
            return tuple(names)
        lengths = longer
