"""`metrics.csv`: one row per logged step, columns that may grow, and a run that continues its own file."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from swin_dense.errors import DataError
from swin_dense.training.atomic_file import atomic_write

STEP = "step"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads a metrics file, also one that is still being written.

    Args:
        path: A file that `MetricsFile` wrote.

    Returns:
        One dict per step, in the order of the file; "step" is a whole number, an empty cell is left out. Rows of one
        step are joined, the later value wins. A last line without its end is taken as not yet written.

    Raises:
        DataError: The file cannot be read, or a line is not a row of numbers.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise DataError(f"{path}: metrics cannot be read ({error.strerror}).") from error
    header, *lines = _complete_lines(text) or [""]
    columns = next(csv.reader([header]), [])
    by_step: dict[float, dict[str, float]] = {}
    for number, line in enumerate(lines, start=2):
        row = _parse(line, columns, f"{path}: line {number}")
        by_step.setdefault(row[STEP], {}).update(row)
    return list(by_step.values())


class MetricsFile:
    """Appends rows to a metrics file; for the main process only.

    Args:
        path: File to write; its folder exists. A file that is there already is continued.
        resume_step: Rows of later steps are dropped, since they will be written again; 0 starts anew.

    Raises:
        DataError: The file that is to be continued cannot be read.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self._path = path
        rows = read_metrics(path) if resume_step > 0 and path.exists() else []
        self._rewrite([row for row in rows if row[STEP] <= resume_step])

    def append(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds one row, and the columns that are new. None, an undefined value, leaves its cell empty.

        Raises:
            DataError: The file was changed from outside so that it cannot be read.
        """
        row = {STEP: step, **{name: value for name, value in values.items() if value is not None}}
        if set(row) <= set(self._columns):
            with open(self._path, "a", encoding="utf-8", newline="") as file:
                file.write(_line([_cell(row.get(column)) for column in self._columns]))
        else:
            self._rewrite([*read_metrics(self._path), row])

    def _rewrite(self, rows: Iterable[Mapping[str, float]]) -> None:
        rows = list(rows)
        self._columns = list(dict.fromkeys([STEP, *(name for row in rows for name in row)]))
        lines = [self._columns, *([_cell(row.get(column)) for column in self._columns] for row in rows)]
        with atomic_write(self._path) as file:
            file.write("".join(map(_line, lines)).encode())


def _complete_lines(text: str) -> list[str]:
    return text.split("\n")[:-1]


def _parse(line: str, columns: list[str], where: str) -> dict[str, float]:
    cells = next(csv.reader([line]), [])
    try:
        named = {column: float(cell) for column, cell in zip(columns, cells, strict=True) if cell}
        return {**named, STEP: int(named[STEP])}
    except (ValueError, KeyError):
        raise DataError(
            f"{where}: expected numbers for {', '.join(columns)}, got {line!r}. Remove this line."
        ) from None


def _cell(value: float | None) -> str:
    """The shortest text that reads back as the same number."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else repr(float(value))


def _line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
