"""What a user sees while a model trains: one live line on a terminal, plain lines now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

COLUMNS = 80


class Progress:
    """Shows step, loss, images/s, time left, learning rate and peak memory; used as a `with` block.

    Args:
        total_steps: Steps of the whole run.
        images_per_step: Images of one step over all processes.
        device: Device whose peak memory is shown; on the CPU that of the process.
        start_step: Steps made before this run began.
        stream: Where to write; standard error by default. A terminal gets the live line of at most 80 columns.
        plain_every_s: Least seconds between two lines where the stream is no terminal.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        images_per_step: int,
        device: torch.device,
        start_step: int = 0,
        stream: TextIO | None = None,
        plain_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._device = device
        self._start_step = self._shown_step = start_step
        self._stream = sys.stderr if stream is None else stream
        self._plain_every_s = plain_every_s
        self._clock = clock
        self._start_s = self._shown_s = clock()
        self._noted_s = self._note_start_s = self._start_s
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._start_s = self._shown_s = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, losses: Mapping[str, float], learning_rate: float) -> None:
        """Shows the newest numbers; call it as often as you like.

        Args:
            step: Steps made.
            losses: Every loss by name.
            learning_rate: That of the step.
        """
        now_s = self._clock()
        is_first_or_last = self._shown_step == self._start_step or step >= self._total_steps
        if self._live is None and not is_first_or_last and now_s - self._shown_s < self._plain_every_s:
            return
        self._show(self._parts(step, losses, learning_rate, now_s))
        self._shown_step, self._shown_s = step, now_s

    def note(self, work: str, done: int, total: int) -> None:
        """Shows how far something beside the training is, such as an evaluation.

        Args:
            work: What is done, in a word or two.
            done: How much of it is done.
            total: All of it.
        """
        now_s = self._clock()
        if done <= 1:
            self._noted_s = self._note_start_s = now_s
        if done >= total:
            self._shown_s = now_s  # the time since the last step was not spent on images
        if self._live is None and now_s - self._noted_s < self._plain_every_s:
            return
        self._noted_s = now_s
        left_s = (total - done) * (now_s - self._note_start_s) / max(1, done - 1)
        self._show([f"{work} {done}/{total}", f"{duration(left_s)} left"])

    def _show(self, parts: list[str]) -> None:
        if self._live is None:
            print("  ".join(parts), file=self._stream, flush=True)
        else:
            columns = min(COLUMNS, self._live.console.width)
            self._live.update(Text(fit(parts, columns), no_wrap=True, overflow="crop"), refresh=True)

    def _parts(self, step: int, losses: Mapping[str, float], learning_rate: float, now_s: float) -> list[str]:
        """The most wanted first: a narrow line is cut from the end."""
        images = (step - self._shown_step) * self._images_per_step
        seconds_per_step = (now_s - self._start_s) / max(1, step - self._start_step)
        return [
            f"{step}/{self._total_steps}",
            f"loss {sum(losses.values()):.4g}",
            f"{images / max(now_s - self._shown_s, 1e-9):.1f} img/s",
            f"{duration((self._total_steps - step) * seconds_per_step)} left",
            f"lr {learning_rate:.1e}",
            f"{peak_memory_bytes(self._device) / 1e9:.1f} GB",
            *(f"{name} {value:.4g}" for name, value in losses.items()),
        ]


def fit(parts: list[str], columns: int) -> str:
    """Joins as many parts, from the first, as go into a line of so many columns."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > columns:
            break
        line += "  " + part
    return line[:columns]


def duration(seconds: float) -> str:
    """Text of a time span: 0:42, 12:05, 3:07:00, 2 d 4:00:00."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest_s:02d}" if hours or days else f"{minutes}:{rest_s:02d}"
    return f"{days} d {clock}" if days else clock


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: torch's on a CUDA device, else the whole process's; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
