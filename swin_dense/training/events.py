"""What a user should know of a run besides its numbers, and the file that keeps it."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """Something that happened in a run and did not end it.

    Args:
        step: The step it happened in.
        kind: Such as "out_of_memory": the step was made in smaller parts; "skipped": it was not made at all;
            "not_saved": a file could not be written.
        text: All of it, in one message.
    """

    step: int
    kind: str
    text: str


def append_event(path: Path, event: Event) -> None:
    """Adds one line to a file of JSON lines: {"step", "time", "kind", "text"}, the time in UTC.

    A line that a crash has torn before stays alone in its line.

    Raises:
        OSError: The file cannot be written.
    """
    line = {"step": event.step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(event)}
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
