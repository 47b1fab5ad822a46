"""A bar with rate and time left on standard error, for work that takes more than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")


class RateColumn(ProgressColumn):
    """How much is done in a second."""

    def render(self, task: Task) -> Text:
        """The rate as text, nothing as long as it is unknown."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


@contextmanager
def progress_bar(title: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar for the length of the block.

    Args:
        title: In front of the bar.
        shown: Whether to show it at all.

    Yields:
        A function to call with how much is done, and how much there is to do.
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(title, total=None)
        try:
            yield lambda done, total: progress.update(task, completed=done, total=total)
        finally:
            if progress.tasks[0].total is None:  # nothing was begun: no empty bar stays, nor an empty line in a file
                progress.live.transient = True
                progress.console.quiet = not progress.console.is_terminal


def tracked(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The items one by one, with a bar that follows."""
    with progress_bar(title) as show:
        for done, item in enumerate(items):
            show(done, len(items))
            yield item
        show(len(items), len(items))
