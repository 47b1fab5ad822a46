"""One run in one folder: a second one would write over the files of the first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swin_dense.errors import ConfigError

LOCK_NAME = "run.lock"


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder while the block lasts; the lock ends with its process, however it ends.

    Args:
        folder: Created where it is missing.

    Raises:
        ConfigError: Another process trains there, or the folder cannot be created.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_NAME, "a+")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror}). Choose another --out.") from None
    with file:
        try:
            # A record lock: unlike flock's, loading processes do not inherit it, and outlive the run for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            raise ConfigError(
                f"{folder}: process {owner} trains here already. Wait for its end, stop it, or choose another --out."
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)
