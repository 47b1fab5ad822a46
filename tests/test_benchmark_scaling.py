import itertools
import math

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.tools import benchmark_scaling
from swin_dense.tools.benchmark_backbone import BackboneContest
from swin_dense.tools.benchmark_contest import OURS, Row
from swin_dense.tools.benchmark_scaling import (
    NOT_OFFERED,
    OUT_OF_MEMORY,
    OVER_THE_LIMIT,
    Point,
    Sweep,
    measure_sweep,
    scaling_sweeps,
    shared_exponents,
    times_within,
)
from swin_dense.tools.benchmark_segment import SegmentationContest

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONTEST = BackboneContest(SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 2), out_features=("c2", "c3")), {})
FOUR_STAGES = BackboneContest(SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3), {})


class _Work:
    """What lasts a thousandth of a second for each thousand pixels to the power of 1.5, on the clock below."""

    def __init__(self, row, factor=1.0):
        self.row, self.factor = row, factor

    def __call__(self):
        pass

    def held_bytes(self):
        return 7


def clock(work):
    return work.factor * (work.row.pixels / 1000) ** 1.5 / 1000


def sweep_of(*sides, of_pixels=True, contest=CONTEST):
    points = [Point(f"{side} px", contest, Row("inference", "float32", 1, (side, side))) for side in sides]
    return Sweep("image size", points, of_pixels)


def own_of(figures, field):
    return [point["contestants"][OURS][field] for point in figures["points"].values()]


@pytest.fixture
def works(monkeypatch):
    """What was begun, by name and side; a peer takes twice as long as ours."""
    made = []

    def work_of(contestant, batch, row):
        made.append((contestant.name, row.size_hw[0]))
        return _Work(row, 1.0 if contestant.name == OURS else 2.0)

    monkeypatch.setattr(benchmark_scaling, "work_of", work_of)
    return made


def test_exponent_of_a_sweep_is_that_of_its_times(works):
    figures = measure_sweep(sweep_of(32, 48, 64), [], 2, 1e9, CPU, clock)
    assert figures["exponents"] == {OURS: pytest.approx(1.5)}
    assert [len(time_s["all"]) for time_s in own_of(figures, "time_s")] == [2, 2, 2]
    assert [point["pixels"] for point in figures["points"].values()] == [32**2, 48**2, 64**2]
    assert own_of(figures, "peak_bytes") == [7] * 3 and own_of(figures, "left_out") == [None] * 3
    assert measure_sweep(sweep_of(32, 64, of_pixels=False), [], 2, 1e9, CPU, clock)["exponents"] == {}


def test_exponents_are_fitted_to_the_points_that_all_have_in_common():
    def point(pixels, **times_s):
        contestants = {name: {"time_s": time_s and {"median": time_s}} for name, time_s in times_s.items()}
        return {"pixels": pixels, "contestants": contestants}

    points = [
        point(1, ours=1.0, slower=2.0, once=None),
        point(4, ours=2.0, slower=8.0, once=3.0),
        point(16, ours=64.0, slower=None, once=None),
    ]
    names = ["ours", "slower", "once"]
    assert shared_exponents(points, names) == {"ours": pytest.approx(0.5), "slower": pytest.approx(1.0), "once": None}
    assert shared_exponents(points, ["ours"])["ours"] == pytest.approx(1.5)
    assert shared_exponents(points[1:], ["slower", "once"]) == {"slower": None, "once": None}


def test_peers_take_part_at_every_point_with_their_own_exponent(works):
    sweep = sweep_of(96, 128, contest=FOUR_STAGES)
    figures = measure_sweep(sweep, ["torchvision", "timm"], 2, 1e9, CPU, clock)
    names = [OURS, "torchvision", "timm"]
    assert works == [(name, side) for side in (96, 128) for name in names]
    assert figures["exponents"] == {name: pytest.approx(1.5) for name in names}
    for point in figures["points"].values():
        times_s = {name: each["time_s"]["median"] for name, each in point["contestants"].items()}
        assert list(times_s) == names and times_s["timm"] == times_s["torchvision"] == 2 * times_s[OURS]


def test_peer_without_such_a_network_is_left_out_there_alone(works):
    figures = measure_sweep(sweep_of(94, 96, 100, contest=FOUR_STAGES), ["timm"], 1, 1e9, CPU, clock)
    lefts = [point["contestants"]["timm"]["left_out"] for point in figures["points"].values()]
    assert lefts == [NOT_OFFERED, None, None] and own_of(figures, "left_out") == [None] * 3


def test_point_that_would_last_too_long_is_not_begun(works):
    limit_s = 2 * (48**2 / 1000) ** 1.5 / 1000
    figures = measure_sweep(sweep_of(32, 48, 96, 192), [], 5, limit_s, CPU, clock)
    assert works == [(OURS, 32), (OURS, 48)]
    assert own_of(figures, "left_out") == [None, None, OVER_THE_LIMIT, OVER_THE_LIMIT]
    assert own_of(figures, "time_s")[2] is None and figures["exponents"] == {OURS: pytest.approx(1.5)}


def test_slower_peer_is_left_out_before_ours(works):
    limit_s = 1.2 * (128**2 / 1000) ** 1.5 / 1000
    figures = measure_sweep(sweep_of(96, 128, contest=FOUR_STAGES), ["torchvision"], 5, limit_s, CPU, clock)
    assert works == [(OURS, 96), ("torchvision", 96), (OURS, 128)]
    assert figures["points"]["128 px"]["contestants"]["torchvision"]["left_out"] == OVER_THE_LIMIT
    assert figures["exponents"] == {OURS: pytest.approx(1.5), "torchvision": None}


def test_memory_that_runs_out_is_a_point_and_not_the_end(works, monkeypatch):
    def work_of(own, batch, row):
        if row.size_hw == (48, 48):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _Work(row)

    monkeypatch.setattr(benchmark_scaling, "work_of", work_of)
    figures = measure_sweep(sweep_of(32, 48, 64), [], 1, 1e9, CPU, clock)
    assert own_of(figures, "left_out") == [None, OUT_OF_MEMORY, None]
    assert figures["exponents"] == {OURS: pytest.approx(1.5)}


def test_other_faults_are_not_taken_for_it(monkeypatch):
    def fail(own, batch, row):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(benchmark_scaling, "work_of", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure_sweep(sweep_of(32), [], 1, 1e9, CPU, clock)


@pytest.mark.parametrize(
    ("limit_s", "expected"), [(100.0, [2.0, 3.0, 4.0]), (6.0, [2.0, 3.0]), (1.0, [1.0]), (1.5, [2.0])]
)
def test_repetitions_end_at_the_limit_and_the_first_is_for_warming_up(limit_s, expected):
    seconds = itertools.count(2)
    times_s = times_within({"a": lambda: None}, {"a": 1.0}, 3, limit_s, lambda work: float(next(seconds)))
    assert times_s == {"a": expected}


def test_contestants_take_turns_until_each_has_used_up_its_limit():
    done = []
    seconds = {"a": 1.0, "b": 4.0}

    def time_of(work):
        done.append(work())
        return seconds[done[-1]]

    times_s = times_within({name: lambda name=name: name for name in "ab"}, seconds, 4, 8.0, time_of)
    assert "".join(done) == "ab" + "a" * 3 and times_s == {"a": [1.0] * 4, "b": [4.0]}


def test_real_work_is_measured():
    figures = measure_sweep(sweep_of(32, 40), [], 1, 60.0, CPU, lambda work: [work(), 1.0][1])
    assert all(peak_bytes > 10_000 for peak_bytes in own_of(figures, "peak_bytes"))


def test_sweeps_go_from_little_to_much():
    sweeps = scaling_sweeps(CONTEST, "bfloat16", "swin_t")
    for mode, (sizes, batches, variants) in (("inference", sweeps[:3]), ("train step", sweeps[3:])):
        assert [point.row.size_hw[0] for point in sizes.points] == [256, 512, 1024, 2048]
        assert [point.row.batch_size for point in batches.points] == [1, 2, 8, 32]
        assert [point.name for point in variants.points] == ["swin_t", "swin_s", "swin_b", "swin_l"]
        widths = [point.contest.config.embed_dim for point in variants.points]
        assert widths == [96, 96, 128, 192]
        for sweep in (sizes, batches):
            pixels = [point.row.pixels for point in sweep.points]
            assert (
                sweep.of_pixels and pixels == sorted(set(pixels)) and all(math.log2(each) % 1 == 0 for each in pixels)
            )
            assert all(point.contest is CONTEST for point in sweep.points)
        rows = [point.row for sweep in (sizes, batches, variants) for point in sweep.points]
        assert {row.precision for row in rows} == {"bfloat16"} and {row.mode for row in rows} == {mode}
    assert len({sweep.title for sweep in sweeps}) == len(sweeps) == 6


def test_batches_are_what_peers_can_train_on():
    *_, sizes, batches, variants = scaling_sweeps(SegmentationContest(FOUR_STAGES.config, {}), "float32", "swin_t")
    assert [point.row.batch_size for point in batches.points] == [2, 8, 32]
    assert {point.row.batch_size for sweep in (sizes, variants) for point in sweep.points} == {2}
