import itertools
import math

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.tools import benchmark_scaling
from swin_dense.tools.benchmark_backbone import BackboneContest
from swin_dense.tools.benchmark_contest import Row
from swin_dense.tools.benchmark_scaling import (
    OUT_OF_MEMORY,
    OVER_THE_LIMIT,
    Point,
    Sweep,
    measure_sweep,
    scaling_sweeps,
    times_within,
)
from swin_dense.tools.benchmark_tables import sweep_table

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONTEST = BackboneContest(SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 2), out_features=("c2", "c3")), {})


class _Work:
    """What lasts a thousandth of a second for each thousand pixels to the power of 1.5, on the clock below."""

    def __init__(self, row):
        self.row = row

    def __call__(self):
        pass

    def held_bytes(self):
        return 7


def clock(work):
    return (work.row.pixels / 1000) ** 1.5 / 1000


def sweep_of(*sides, of_pixels=True):
    points = [Point(f"{side} px", CONTEST, Row("inference", "float32", 1, (side, side))) for side in sides]
    return Sweep("image size", points, of_pixels)


@pytest.fixture
def works(monkeypatch):
    made = []
    monkeypatch.setattr(benchmark_scaling, "work_of", lambda own, batch, row: made.append(row) or _Work(row))
    return made


def test_exponent_of_a_sweep_is_that_of_its_times(works):
    figures = measure_sweep(sweep_of(32, 48, 64), 2, 1e9, CPU, clock)
    assert figures["exponent"] == pytest.approx(1.5)
    assert [len(point["time_s"]["all"]) for point in figures["points"].values()] == [2, 2, 2]
    assert [point["pixels"] for point in figures["points"].values()] == [32**2, 48**2, 64**2]
    assert all(point["peak_bytes"] == 7 and point["left_out"] is None for point in figures["points"].values())
    assert measure_sweep(sweep_of(32, 64, of_pixels=False), 2, 1e9, CPU, clock)["exponent"] is None


def test_point_that_would_last_too_long_is_not_begun(works):
    limit_s = 2 * (48**2 / 1000) ** 1.5 / 1000
    figures = measure_sweep(sweep_of(32, 48, 96, 192), 5, limit_s, CPU, clock)
    assert [row.size_hw[0] for row in works] == [32, 48]
    points = figures["points"]
    assert points["96 px"]["left_out"] == points["192 px"]["left_out"] == OVER_THE_LIMIT
    assert points["96 px"]["time_s"] is None and figures["exponent"] == pytest.approx(1.5)
    table = sweep_table(figures)
    assert table["96 px"] == {"ms": OVER_THE_LIMIT, "megapixels a second": "n/a", "peak memory": "n/a"}
    assert table["32 px"]["ms"].startswith(f"{1000 * points['32 px']['time_s']['median']:.1f} (")


def test_memory_that_runs_out_is_a_point_and_not_the_end(works, monkeypatch):
    def work_of(own, batch, row):
        if row.size_hw == (48, 48):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _Work(row)

    monkeypatch.setattr(benchmark_scaling, "work_of", work_of)
    figures = measure_sweep(sweep_of(32, 48, 64), 1, 1e9, CPU, clock)
    lefts = [point["left_out"] for point in figures["points"].values()]
    assert lefts == [None, OUT_OF_MEMORY, None] and figures["exponent"] == pytest.approx(1.5)


def test_other_faults_are_not_taken_for_it(monkeypatch):
    def fail(own, batch, row):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(benchmark_scaling, "work_of", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_sweep(sweep_of(32), 1, 1e9, CPU, clock)


@pytest.mark.parametrize(
    ("limit_s", "expected"), [(100.0, [2.0, 3.0, 4.0]), (6.0, [2.0, 3.0]), (1.0, [1.0]), (1.5, [2.0])]
)
def test_repetitions_end_at_the_limit_and_the_first_is_for_warming_up(limit_s, expected):
    seconds = itertools.count(1)
    assert times_within(lambda: None, 3, limit_s, lambda work: float(next(seconds))) == expected


def test_real_work_is_measured(monkeypatch):
    figures = measure_sweep(sweep_of(32, 40), 1, 60.0, CPU, lambda work: [work(), 1.0][1])
    assert all(point["peak_bytes"] > 10_000 for point in figures["points"].values())


def test_sweeps_go_from_little_to_much():
    sizes, batches, variants = scaling_sweeps(CONTEST, "bfloat16", "swin_t")
    assert [point.row.size_hw[0] for point in sizes.points] == [256, 512, 1024, 2048]
    assert [point.row.batch_size for point in batches.points] == [1, 2, 4, 8, 16, 32]
    assert [point.name for point in variants.points] == ["swin_t", "swin_s", "swin_b", "swin_l"]
    widths = [point.contest.config.embed_dim for point in variants.points]
    assert widths == [96, 96, 128, 192]
    for sweep in (sizes, batches):
        pixels = [point.row.pixels for point in sweep.points]
        assert sweep.of_pixels and pixels == sorted(set(pixels)) and all(math.log2(each) % 1 == 0 for each in pixels)
        assert all(point.contest is CONTEST for point in sweep.points)
    assert {point.row.precision for sweep in (sizes, batches, variants) for point in sweep.points} == {"bfloat16"}
