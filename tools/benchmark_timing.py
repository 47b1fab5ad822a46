"""Time, memory and arithmetic of pieces of work. They take turns in one process: a slow moment slows them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from swin_dense.tools.benchmark import spread

Work = Callable[[], object]
Clock = Callable[[Work], float]
"""The seconds that a piece of work takes, once."""

_PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


def clock_of(device: torch.device) -> Clock:
    """Wall time, until the device has finished."""

    def time_s(work: Work) -> float:
        synchronize(device)
        started_s = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - started_s

    return time_s


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    works: Mapping[str, Work],
    time_of: Clock,
    warmup: int,
    rounds: int,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Time all works round after round; each round begins with the next one, so that none always follows the same.

    Args:
        works: By name.
        time_of: The clock.
        warmup: Rounds before, which are not timed.
        rounds: How many are.
        on_round: Gets how many rounds are done and how many there are.

    Returns:
        For each name the seconds of every round.
    """
    names = list(works)
    times_s: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if number < warmup:
                works[name]()
            else:
                times_s[name].append(time_of(works[name]))
        on_round(number + 1, warmup + rounds)
    return times_s


def paired_ratio(times_s: Sequence[float], own_times_s: Sequence[float]) -> dict[str, Any]:
    """How many times as long as ours, round by round: `spread` of the ratios."""
    return spread([other / own for other, own in zip(times_s, own_times_s, strict=True)])


def peak_extra_bytes(work: Work, device: torch.device) -> int:
    """The most that torch's allocator hands out for a piece of work, beyond what is held before it."""
    if device.type != "cuda":
        return _cpu_peak_extra_bytes(work)
    synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _cpu_peak_extra_bytes(work: Work) -> int:
    # The CPU's allocator keeps no peak, but tells the profiler of everything that it hands out and takes back.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    kept: Any = profiler.profiler
    events = [event for event in kept.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())), initial=0))


def matrix_flops(work: Work) -> int:
    """The floating-point operations of all matrix products and convolutions that torch makes in a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@dataclass(frozen=True)
class LargeProduct:
    """One product of two large square matrices, to be called: what the device can do at most.

    Attributes:
        left: (N, N).
        right: (N, N).
    """

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def on(cls, device: torch.device, precision: str) -> LargeProduct:
        """Random matrices of a device and a precision, such as "bfloat16"."""
        side, dtype = _PRODUCT_SIDE[device.type], getattr(torch, precision)
        return cls(*(torch.randn(side, side, device=device).to(dtype) for _ in range(2)))

    def __call__(self) -> torch.Tensor:
        """Multiply."""
        return self.left @ self.right

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return 2 * self.left.shape[0] ** 3


def fitted_exponent(pixels: Sequence[float], times_s: Sequence[float]) -> float | None:
    """The k of time = a pixels^k, by least squares of the logarithms; None for fewer than two points."""
    if len(set(pixels)) < 2:
        return None
    x, y = ([math.log(value) for value in values] for values in (pixels, times_s))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)
