"""Which micro-batch a step is made of: the largest that fits into memory, at the same effective batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """How a process makes its share of a step.

    Attributes:
        micro_batch_size: Images at once.
        accumulation_steps: How many times.
        checkpoint_stages: Stages of the backbone that recompute activations in the backward pass.
    """

    micro_batch_size: int
    accumulation_steps: int
    checkpoint_stages: tuple[int, ...] = ()

    def __str__(self) -> str:
        stages = f", recomputing stages {list(self.checkpoint_stages)}" if self.checkpoint_stages else ""
        return f"{self.micro_batch_size} x {self.accumulation_steps}{stages}"


@dataclass(frozen=True)
class Candidate:
    """A split, and what it was measured to cost.

    Attributes:
        split: The split.
        peak_bytes: Most memory in use; None where it ran out.
        step_time_s: Of a whole step; None where memory ran out.
        usable_bytes: Of the memory that there is.
    """

    split: Split
    peak_bytes: int | None
    step_time_s: float | None
    usable_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what is usable."""
        return self.peak_bytes is not None and self.peak_bytes <= self.usable_bytes


def splits(share: int, checkpoint_stages: tuple[int, ...] = ()) -> list[Split]:
    """All ways to make a share of so many images from equal micro-batches, the largest first."""
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    return [Split(size, share // size, checkpoint_stages) for size in sizes]


def first_that_fits(ways: Sequence[Split], measure: Callable[[Split], Candidate]) -> list[Candidate]:
    """Measures one after another up to the first that fits; returns all that were measured."""
    measured: list[Candidate] = []
    for way in ways:
        measured.append(measure(way))
        if measured[-1].fits:
            break
    return measured


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The largest micro-batch that fits, of equal ones the one that recomputes least; None where nothing fits.

    More memory never makes it smaller.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    return max(
        fitting,
        key=lambda each: (each.split.micro_batch_size, -len(each.split.checkpoint_stages)),
        default=None,
    )
