"""How the time of a prediction and of a train step grows with the image, the batch and the variant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swin_dense.config import variant_config
from swin_dense.errors import ConfigError
from swin_dense.tools.benchmark import spread
from swin_dense.tools.benchmark_contest import (
    OURS,
    Contest,
    Contestant,
    Inference,
    Mode,
    Precision,
    Row,
    Training,
    work_of,
)
from swin_dense.tools.benchmark_timing import Clock, Work, fitted_exponent, peak_extra_bytes
from swin_dense.tools.progress_bar import tracked
from swin_dense.training.out_of_memory import is_out_of_memory

SIDES = (256, 512, 1024, 2048)
BATCH_SIZES = (1, 2, 8, 32)
VARIANTS = ("swin_t", "swin_s", "swin_b", "swin_l")
_SIDE = 512  # of the images of the other two sweeps
_MODES: tuple[Mode, ...] = ("inference", "train step")

OUT_OF_MEMORY, OVER_THE_LIMIT, NOT_OFFERED = "out of memory", "over the limit", "not offered"


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        name: What is particular in it.
        contest: Builds the contestants; points of one model share it.
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
    """Image side 256 to 2048, batch 1 to 32, Swin-T to Swin-L; of each inference and train step.

    Args:
        contest: What kind of model.
        precision: Of all.
        variant: Of `contest`, for the titles.
    """
    return [sweep for mode in _MODES for sweep in _sweeps_of(mode, contest, precision, variant)]


def _sweeps_of(mode: Mode, contest: Contest[Any], precision: Precision, variant: str) -> list[Sweep]:
    row = Row(mode, precision, contest.least_training_batch if mode == "train step" else 1, (_SIDE, _SIDE))
    sides = [Point(f"{side} x {side}", contest, replace(row, size_hw=(side, side))) for side in SIDES]
    batches = [
        Point(f"batch {size}", contest, replace(row, batch_size=size)) for size in BATCH_SIZES if size >= row.batch_size
    ]
    variants = [Point(name, replace(contest, config=variant_config(name)), row) for name in VARIANTS]
    work, size = f"{mode}, {precision}", f"{_SIDE} x {_SIDE}"
    return [
        Sweep(f"image size ({work}, {variant}, batch {row.batch_size})", sides, of_pixels=True),
        Sweep(f"batch ({work}, {variant}, {size})", batches, of_pixels=True),
        Sweep(f"variant ({work}, batch {row.batch_size}, {size})", variants, of_pixels=False),
    ]


def measure_sweep(
    sweep: Sweep, peers: Sequence[str], repeats: int, limit_s: float, device: torch.device, time_of: Clock
) -> dict[str, Any]:
    """Measure the points of a sweep; at each of them ours and the peers take turns.

    Args:
        sweep: What to measure.
        peers: Of the points' contests, installed.
        repeats: How often each contestant at each point, as far as time suffices.
        limit_s: Of each contestant at each point. What can be seen to need more for a single step, by the pixels of
            the point before, is not begun.
        device: Where.
        time_of: The clock.

    Returns:
        {"title", "points": by name {"pixels", "contestants": by name {"time_s", "peak_bytes", "left_out"}},
        "exponents": by contestant}: "time_s" and "peak_bytes" are None where "left_out" says why; exponents of time
        against pixels are those of `shared_exponents`, and there are none where pixels are not what differs.
    """
    names = [OURS, *peers]
    points: dict[str, dict[str, Any]] = {}
    own: Contestant[Any] | None = None
    built_by: Contest[Any] | None = None
    pixels_per_s = dict.fromkeys(names, float("inf"))
    for point in tracked(sweep.points, sweep.title):
        pixels = point.row.pixels
        if own is None or built_by is not point.contest:
            own, built_by = point.contest.own(point.row), point.contest
        begun = [name for name in names if not sweep.of_pixels or pixels / pixels_per_s[name] <= limit_s]
        measured = _measure_point(point, own, begun, repeats, limit_s, device, time_of) if begun else {}
        contestants = {name: measured.get(name, _left_out(OVER_THE_LIMIT)) for name in names}
        points[point.name] = {"pixels": pixels, "contestants": contestants}
        pixels_per_s |= {
            name: pixels / each["time_s"]["median"] for name, each in contestants.items() if each["time_s"] is not None
        }
    exponents = shared_exponents(points.values(), names) if sweep.of_pixels else {}
    return {"title": sweep.title, "points": points, "exponents": exponents}


def _measure_point(
    point: Point,
    own: Contestant[Any],
    names: Sequence[str],
    repeats: int,
    limit_s: float,
    device: torch.device,
    time_of: Clock,
) -> dict[str, dict[str, Any]]:
    measured: dict[str, dict[str, Any]] = {}
    contestants: dict[str, Contestant[Any]] = {}
    own.model.cpu()  # where the peers take its weights
    batch = point.contest.batch(point.row)
    for name in names:
        try:
            contestants[name] = own if name == OURS else point.contest.peer(name, own, point.row)
        except ConfigError:
            measured[name] = _left_out(NOT_OFFERED)
    works: dict[str, Inference[Any] | Training[Any]] = {}
    first_s: dict[str, float] = {}
    for name, contestant in contestants.items():
        try:
            contestant.model.to(device)
            work = work_of(contestant, batch.to(device), point.row)
            first_s[name] = time_of(work)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            measured[name] = _left_out(OUT_OF_MEMORY)
        else:
            works[name] = work
    for name, times_s in times_within(works, first_s, repeats, limit_s, time_of).items():
        peak_bytes = works[name].held_bytes() + peak_extra_bytes(works[name], device)
        measured[name] = {"time_s": spread(times_s), "peak_bytes": peak_bytes, "left_out": None}
    return measured


def _left_out(why: str) -> dict[str, Any]:
    return {"time_s": None, "peak_bytes": None, "left_out": why}


def shared_exponents(points: Collection[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
    """The exponent of each contestant, fitted to the points that all have in common, so that they compare.

    Args:
        points: As in `measure_sweep`.
        names: Of the contestants. One with fewer than two points has no exponent and leaves the others theirs.
    """
    times_s = {
        name: {
            point["pixels"]: point["contestants"][name]["time_s"]["median"]
            for point in points
            if point["contestants"][name]["time_s"] is not None
        }
        for name in names
    }
    comparable = [set(of_pixels) for of_pixels in times_s.values() if len(of_pixels) > 1]
    shared = sorted(set.intersection(*comparable)) if comparable else []
    return {
        name: fitted_exponent(shared, [of_pixels[pixels] for pixels in shared]) if len(of_pixels) > 1 else None
        for name, of_pixels in times_s.items()
    }


def times_within(
    works: Mapping[str, Work], first_s: Mapping[str, float], repeats: int, limit_s: float, time_of: Clock
) -> dict[str, list[float]]:
    """Seconds of at most so many repetitions of each, in turns, until it has used up the limit.

    Args:
        works: By name.
        first_s: How long each lasted before, for warming up; counts only where it used up the limit.
        repeats: How often each at most.
        limit_s: Of each.
        time_of: The clock.
    """
    times_s = {name: [first_s[name]] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if sum(times_s[name]) < limit_s:
                times_s[name].append(time_of(work))
    return {name: values[1:] or values for name, values in times_s.items()}
