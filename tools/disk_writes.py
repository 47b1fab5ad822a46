"""Writing while a run goes on: a full disk is told, and must not end hours of training."""

from __future__ import annotations

from collections.abc import Callable

from swin_dense.errors import CheckpointError
from swin_dense.training.events import Event


class DiskWrites:
    """Remembers which files could not be written, until they can.

    Args:
        tell: Gets an event for each failure.

    Attributes:
        failed: By the name of the file what went wrong the last time; files written since are not among them.
    """

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self.failed: dict[str, str] = {}

    def attempt(self, name: str, step: int, write: Callable[[], object]) -> bool:
        """Write a file, or say why not.

        Args:
            name: The file's, as the user knows it.
            step: The present one.
            write: Writes it; the former file must survive where it fails.

        Returns:
            Whether it was written.
        """
        try:
            write()
        except (OSError, CheckpointError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            self.failed[name] = reason
            self._tell(Event(step, "not_saved", f"step {step}: {name} is not saved, the run goes on: {reason}"))
            return False
        self.failed.pop(name, None)
        return True

    def complaint(self, *names: str) -> str:
        """What is not on the disk that should be, in one sentence; empty if all is.

        Args:
            names: The files that matter; none means all.
        """
        missing = [f"{name} ({reason})" for name, reason in self.failed.items() if not names or name in names]
        return f"the last version could not be saved of {', '.join(missing)}." if missing else ""
