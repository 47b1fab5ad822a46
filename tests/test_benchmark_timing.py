import itertools
import math

import pytest
import torch

from swin_dense.tools import benchmark_timing
from swin_dense.tools.benchmark_timing import (
    LargeProduct,
    clock_of,
    fitted_exponent,
    matrix_flops,
    paired_ratio,
    peak_extra_bytes,
    take_turns,
)

CPU = torch.device("cpu")


def test_contestants_take_turns_and_begin_in_turn():
    done = []
    works = {name: lambda name=name: done.append(name) for name in "abc"}
    shown = []

    def time_of(work):
        done.append("timed")
        work()
        return float(len(done))

    times_s = take_turns(works, time_of, warmup=1, rounds=3, on_round=lambda *numbers: shown.append(numbers))
    assert "".join(done).replace("timed", ".") == "abc" + ".b.c.a" + ".c.a.b" + ".a.b.c"
    assert all(len(times) == 3 for times in times_s.values()) and list(times_s) == ["a", "b", "c"]
    assert times_s["b"][0] == 5.0 and times_s["a"][2] == 17.0
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_ratio_is_paired_round_by_round():
    slow_rounds = [1.0, 10.0, 100.0]
    assert paired_ratio([2 * each for each in slow_rounds], slow_rounds) == {
        "median": 2.0,
        "min": 2.0,
        "max": 2.0,
        "all": [2.0] * 3,
    }
    # The medians alone would say 1.
    assert paired_ratio([1.0, 5.0, 9.0], [2.0, 5.0, 3.0])["all"] == [0.5, 1.0, 3.0]


def test_contestant_against_itself_has_a_ratio_around_one():
    ticks = itertools.count()
    times_s = take_turns(dict.fromkeys("ab", lambda: None), lambda work: 1.0 + 0.1 * (next(ticks) % 3), 0, 7)
    ratio = paired_ratio(times_s["a"], times_s["b"])
    assert ratio["min"] < 1 < ratio["max"] and 0.8 < ratio["median"] < 1.2


def test_clock_gives_the_seconds_between_two_looks(monkeypatch):
    looks = iter([3.0, 7.5])
    monkeypatch.setattr(benchmark_timing.time, "perf_counter", lambda: next(looks))
    done = []
    assert clock_of(CPU)(lambda: done.append(1)) == 4.5 and done == [1]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.97])
def test_exponent_of_exact_data_is_recovered(exponent):
    pixels = [7, 64, 1000, 4096]
    assert fitted_exponent(pixels, [0.3 * each**exponent for each in pixels]) == pytest.approx(exponent, abs=1e-12)


def test_exponent_is_fitted_to_all_points():
    assert fitted_exponent([1, math.e, math.e**2], [1, math.e**1.5, math.e**2]) == pytest.approx(1.0)
    assert fitted_exponent([9], [1.0]) is fitted_exponent([], []) is fitted_exponent([4, 4], [1.0, 2.0]) is None


def test_operations_of_products_are_two_for_each_multiplication():
    left, right = torch.rand(3, 5), torch.rand(5, 7)
    assert matrix_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    assert matrix_flops(lambda: left + left) == 0


def test_large_product_makes_the_operations_that_it_tells(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "_PRODUCT_SIDE", {"cpu": 10})
    product = LargeProduct.on(CPU, "bfloat16")
    assert product().shape == (10, 10) and product().dtype == torch.bfloat16
    assert product.flops == matrix_flops(product) == 2 * 10**3


def test_peak_counts_what_is_held_at_once():
    kept = torch.zeros(1000)

    def work():
        first = torch.zeros(3000)
        second = first + 1
        del first
        return kept + second[:1000]

    assert 0 <= peak_extra_bytes(work, CPU) - 2 * 4 * 3000 < 100  # a number that is added is a tensor too
    assert peak_extra_bytes(lambda: None, CPU) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_a_gpu_counts_what_is_added():
    device = torch.device("cuda")
    kept = torch.zeros(2**20, device=device)
    assert peak_extra_bytes(lambda: kept + 1, device) == 4 * 2**20
