"""What a conversion meets: faults, all of them in one message, and notes of what was changed or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swin_dense.errors import DataError

MAX_LISTED = 100


class Findings:
    """Collects while a source is read, so that one run tells everything that is wrong in it.

    Attributes:
        faults: messages of what cannot be converted.
        notes: how often something was changed or left out on the way, by its description.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.notes: Counter[str] = Counter()

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps a `DataError` of the block as a fault, and goes on after the block."""
        try:
            yield
        except DataError as error:
            self.faults.append(str(error))

    def require_none(self, source: str | Path) -> None:
        """Ends the conversion where there are faults.

        Raises:
            DataError: there is at least one; the message lists up to 100.
        """
        if not self.faults:
            return
        listed = "".join(f"\n  {fault}" for fault in self.faults[:MAX_LISTED])
        count = len(self.faults)
        more = f"\n  and {count - MAX_LISTED} more" if count > MAX_LISTED else ""
        raise DataError(f"{source}: nothing was written; {count} {'fault' if count == 1 else 'faults'}:{listed}{more}")


def listed_values(values: list[str], limit: int = 5) -> str:
    """Returns the first values with commas between them, and how many more there are."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more
