"""A loader that survives its worker processes: when one dies or hangs, loading starts anew at the batch that is due."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from swin_dense.errors import DataError

Batch = TypeVar("Batch")

MAX_RESTARTS = 3
POLL_S = 5
"""How often a waiting loader looks whether its workers live: its `timeout`, in seconds."""

_TIMED_OUT = "DataLoader timed out"
# What torch's DataLoader says, in a plain RuntimeError, of a worker that was killed, left, or did not answer.
_WORKER_TROUBLE = re.compile(rf"DataLoader worker \(pid.*(killed|exited)|{_TIMED_OUT}")
# What it puts before the traceback of an error that a living worker met in the data set.
_ERROR_IN_DATA = "in DataLoader worker process"


def restarting(
    load_from: Callable[[int], Iterable[Batch]],
    *,
    patience_s: float = 0.0,
    max_restarts: int = MAX_RESTARTS,
    on_restart: Callable[[str], None],
) -> Iterator[Batch]:
    """The batches of a loader, whose workers may die.

    A worker dies when the machine runs out of memory, of shared memory, or somebody stops it; the batches themselves
    follow from their number, so nothing is lost or repeated.

    Args:
        load_from: Gives the batches from a number on, counted from the first batch of this call; called again after
            each restart. A DataLoader with workers should have `timeout=POLL_S`: then a worker's death shows so soon.
        patience_s: A batch that has not come after so many seconds is loaded anew; 0 waits for ever.
        max_restarts: How often the same batch is tried again.
        on_restart: Gets a sentence for each restart.

    Yields:
        Batches in order.

    Raises:
        DataError: Workers die again and again at the same batch; says what to do.
    """
    number, restarts = 0, 0
    while True:
        try:
            for batch in _patient(_quiet(load_from(number)), patience_s):
                number, restarts = number + 1, 0
                yield batch
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_worker_trouble(error):
                raise
            reason = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
        restarts += 1
        if restarts > max_restarts:
            raise DataError(
                f"loading stopped {restarts} times at the same batch: {reason}. Workers are mostly killed for want of "
                "memory: lower run.workers, or free memory (also /dev/shm)."
            )
        on_restart(f"{reason}. Loading starts anew at this batch (time {restarts} of {max_restarts}).")


def _patient(batches: Iterator[Batch], patience_s: float) -> Iterator[Batch]:
    """The same batches; the loader's own timeout, after which it looks at its workers, ends nothing by itself."""
    while True:
        waiting_since_s = time.monotonic()
        while True:
            try:
                batch = next(batches)
                break
            except StopIteration:
                return
            except RuntimeError as error:
                if _TIMED_OUT not in str(error):
                    raise
            if patience_s and time.monotonic() - waiting_since_s >= patience_s:
                raise RuntimeError(f"{_TIMED_OUT} after {patience_s:g} seconds")
        yield batch


def _quiet(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches, but a worker's death shows when the next batch is asked for, not in the midst of a step.

    torch's handler of SIGCHLD raises wherever the main thread happens to be. Without it a death shows within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(batches)
    former = signal.getsignal(signal.SIGCHLD)
    iterator = iter(batches)
    # Any loader before may have left torch's handler, which is set once for all of them.
    is_torchs = getattr(former, "__module__", "").startswith("torch.")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if former is None or is_torchs else former)
    return iterator


def _is_worker_trouble(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return _WORKER_TROUBLE.search(str(error)) is not None
    # A worker that dies while it hands over a batch leaves a broken pipe or a file that is gone.
    return _ERROR_IN_DATA not in str(error)
