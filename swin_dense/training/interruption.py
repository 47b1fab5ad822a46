"""SIGINT and SIGTERM at a moment when nothing is lost: the loop asks, the signal does not break in."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from swin_dense.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Takes SIGINT and SIGTERM for the length of a `with` block and puts the former handlers back.

    The first signal is only noted in `signal_number`. A second SIGINT raises KeyboardInterrupt at once. Outside the
    main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._raise_at_once = False
        self._interrupted_at_s: float | None = None
        self._former_handlers: dict[signal.Signals, object] = {}
        # On Ctrl-C the terminal and torchrun both send SIGINT to the workers: that is one wish, not two.
        self._repeat_after_s = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._former_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            # None: the handler was not set from Python and cannot be put back; the default is nearest to it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this block a signal raises `Interrupted` where it arrives: for long work that may be repeated."""
        self._raise_at_once = True
        try:
            if self.signal_number is not None:
                raise Interrupted(self.signal_number)
            yield
        finally:
            self._raise_at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at_s is not None and now_s - self._interrupted_at_s >= self._repeat_after_s:
                raise KeyboardInterrupt
            if self._interrupted_at_s is None:
                self._interrupted_at_s = now_s
        if self.signal_number is None:
            self.signal_number = number
        if self._raise_at_once:
            raise Interrupted(self.signal_number)
