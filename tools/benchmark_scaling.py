"""How the time of a prediction grows with the image, the batch and the variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swin_dense.config import variant_config
from swin_dense.tools.benchmark import spread
from swin_dense.tools.benchmark_contest import Contest, Contestant, Precision, Row, work_of
from swin_dense.tools.benchmark_timing import Clock, Work, fitted_exponent, peak_extra_bytes
from swin_dense.tools.progress_bar import tracked
from swin_dense.training.out_of_memory import is_out_of_memory

SIDES = (256, 512, 1024, 2048)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
VARIANTS = ("swin_t", "swin_s", "swin_b", "swin_l")
_SIDE = 512  # of the images of the other two sweeps

OUT_OF_MEMORY, OVER_THE_LIMIT = "out of memory", "over the limit"


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        name: What is particular in it.
        contest: Builds the contestant, ours; points of one model share it.
        row: The work.
    """

    name: str
    contest: Contest[Any]
    row: Row


@dataclass(frozen=True)
class Sweep:
    """Measurements that differ in one thing.

    Attributes:
        title: In what.
        points: From little to much work.
        of_pixels: Whether it is pixels, so that an exponent can be fitted.
    """

    title: str
    points: Sequence[Point]
    of_pixels: bool


def scaling_sweeps(contest: Contest[Any], precision: Precision, variant: str) -> list[Sweep]:
    """Image side 256 to 2048, batch 1 to 32, Swin-T to Swin-L; inference in all.

    Args:
        contest: What kind of model.
        precision: Of all.
        variant: Of `contest`, for the titles.
    """
    row = Row("inference", precision, 1, (_SIDE, _SIDE))
    sides = [Point(f"{side} x {side}", contest, replace(row, size_hw=(side, side))) for side in SIDES]
    batches = [Point(f"batch {size}", contest, replace(row, batch_size=size)) for size in BATCH_SIZES]
    variants = [Point(name, replace(contest, config=variant_config(name)), row) for name in VARIANTS]
    return [
        Sweep(f"image size ({variant}, batch 1)", sides, of_pixels=True),
        Sweep(f"batch ({variant}, {_SIDE} x {_SIDE})", batches, of_pixels=True),
        Sweep(f"variant (batch 1, {_SIDE} x {_SIDE})", variants, of_pixels=False),
    ]


def measure_sweep(sweep: Sweep, repeats: int, limit_s: float, device: torch.device, time_of: Clock) -> dict[str, Any]:
    """Measure the points of a sweep.

    Args:
        sweep: What to measure.
        repeats: How often each point, as far as time suffices.
        limit_s: Of each point. A point that can be seen to need more for a single prediction, by the pixels of the
            point before, is not begun.
        device: Where.
        time_of: The clock.

    Returns:
        {"title", "points": by name {"pixels", "time_s", "peak_bytes", "left_out"}, "exponent"}: "time_s" and
        "peak_bytes" are None where "left_out" says why; the exponent of time against pixels is None where none fits.
    """
    points: dict[str, dict[str, Any]] = {}
    own: Contestant[Any] | None = None
    built_by: Contest[Any] | None = None
    pixels_per_s = float("inf")
    for point in tracked(sweep.points, sweep.title):
        measured: dict[str, Any] = {"pixels": point.row.pixels, "time_s": None, "peak_bytes": None, "left_out": None}
        points[point.name] = measured
        if sweep.of_pixels and point.row.pixels / pixels_per_s > limit_s:
            measured["left_out"] = OVER_THE_LIMIT
            continue
        if own is None or built_by is not point.contest:
            own, built_by = point.contest.own(point.row), point.contest
            own.model.to(device)
        try:
            work = work_of(own, point.contest.batch(point.row).to(device), point.row)
            measured["time_s"] = spread(times_within(work, repeats, limit_s, time_of))
            measured["peak_bytes"] = work.held_bytes() + peak_extra_bytes(work, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            measured["left_out"] = OUT_OF_MEMORY
            continue
        pixels_per_s = point.row.pixels / measured["time_s"]["median"]
    done = [each for each in points.values() if each["time_s"] is not None]
    pixels, times_s = [each["pixels"] for each in done], [each["time_s"]["median"] for each in done]
    exponent = fitted_exponent(pixels, times_s) if sweep.of_pixels else None
    return {"title": sweep.title, "points": points, "exponent": exponent}


def times_within(work: Work, repeats: int, limit_s: float, time_of: Clock) -> list[float]:
    """Seconds of at most so many repetitions, until the limit; the first counts only where it uses up the limit."""
    times_s = [time_of(work)]
    while len(times_s) <= repeats and sum(times_s) < limit_s:
        times_s.append(time_of(work))
    return times_s[1:] or times_s
