import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from swin_dense.errors import ConfigError
from swin_dense.training.schedule import (
    cosine_factor,
    cosine_schedule,
    poly_factor,
    poly_schedule,
    step_factor,
    step_schedule,
    warmup_factor,
)

COCO = {"warmup_steps": 500, "warmup_start": 0.001, "milestones": (27 * 7330, 33 * 7330), "gamma": 0.1}
IMAGENET = {"total_steps": 300 * 1252, "warmup_steps": 20 * 1252, "warmup_start": 0.001, "minimum": 0.01}
ADE20K = {"total_steps": 160_000, "warmup_steps": 1500, "warmup_start": 1e-6}


def sgd(learning_rate=2.0):
    return torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=learning_rate)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),
        (250, 0.5005),
        (500, 1.0),
        (27 * 7330 - 1, 1.0),
        (27 * 7330, 0.1),
        (33 * 7330 - 1, 0.1),
        (33 * 7330, 0.01),
        (36 * 7330, 0.01),
    ],
)
def test_step_factor_is_the_published_coco_schedule(step, factor):
    assert step_factor(step, **COCO) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1e-6),
        (750, (1 - 0.5 * (1 - 1e-6)) * (1 - 750 / 160_000)),
        (1500, 1 - 1500 / 160_000),
        (80_000, 0.5),
        (159_999, 1 / 160_000),
        (160_000, 0.0),
        (200_000, 0.0),
    ],
)
def test_poly_factor_is_the_published_ade20k_schedule(step, factor):
    assert poly_factor(step, **ADE20K) == pytest.approx(factor, rel=1e-9, abs=1e-15)


def test_poly_factor_power_and_minimum():
    assert poly_factor(50, total_steps=100, warmup_steps=0, warmup_start=1.0, power=2.0, minimum=0.2) == pytest.approx(
        0.2 + 0.8 * 0.25
    )
    assert poly_factor(100, total_steps=100, warmup_steps=0, warmup_start=1.0, minimum=0.2) == pytest.approx(0.2)


def test_cosine_factor_is_the_published_imagenet_schedule():
    optimizer = sgd(1e-3)
    published = CosineLRScheduler(
        optimizer,
        t_initial=280 * 1252,
        lr_min=1e-5,
        warmup_lr_init=1e-6,
        warmup_t=20 * 1252,
        cycle_limit=1,
        t_in_epochs=False,
        warmup_prefix=True,
    )
    for step in (0, 1, 12_520, 25_039, 25_040, 25_041, 100_003, 200_000, 375_599):
        published.step_update(step)
        assert 1e-3 * cosine_factor(step, **IMAGENET) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert cosine_factor(375_600, **IMAGENET) == cosine_factor(10**6, **IMAGENET) == pytest.approx(0.01)
    without_warmup = {"total_steps": 90, "warmup_steps": 0, "warmup_start": 1.0}
    assert cosine_factor(30, **without_warmup) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)


@given(st.integers(0, 2000), st.integers(0, 1000), st.floats(1e-6, 1.0))
def test_factors_are_bounded_and_warmup_never_falls(step, warmup_steps, start):
    warmup = {"warmup_steps": warmup_steps, "warmup_start": start}
    assert start - 1e-12 <= warmup_factor(step, **warmup) <= warmup_factor(step + 1, **warmup) <= 1.0
    assert 0.0 <= poly_factor(step, total_steps=1500, **warmup) <= 1.0
    assert 0.0 <= cosine_factor(step, total_steps=1500, **warmup) <= 1.0
    assert 0.0 < step_factor(step, milestones=(700, 900), gamma=0.1, **warmup) <= 1.0


@pytest.mark.parametrize(
    ("build", "factor", "settings"),
    [
        (step_schedule, step_factor, {"warmup_steps": 3, "warmup_start": 0.1, "milestones": (5, 7), "gamma": 0.5}),
        (poly_schedule, poly_factor, {"warmup_steps": 3, "warmup_start": 0.1, "total_steps": 11}),
        (cosine_schedule, cosine_factor, {"warmup_steps": 3, "warmup_start": 0.1, "total_steps": 11, "minimum": 0.2}),
    ],
)
def test_schedules_give_the_rate_of_each_update_and_resume(build, factor, settings):
    optimizer = sgd()
    scheduler = build(optimizer, **settings)
    for step in range(6):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * factor(step, **settings))
        optimizer.step()
        scheduler.step()
    resumed_optimizer = sgd()
    resumed = build(resumed_optimizer, **settings)
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed_optimizer.step()
    resumed.step()
    assert resumed_optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * factor(7, **settings))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"warmup_start": 0.0}, "warmup_start"),
        ({"milestones": (7, 5)}, r"milestones must be rising.*\[7, 5\]"),
        ({"milestones": (5, 5)}, "milestones must be rising"),
        ({"gamma": 1.5}, "gamma must be"),
    ],
)
def test_step_schedule_refuses_bad_values(change, text):
    settings = {"warmup_steps": 3, "warmup_start": 0.1, "milestones": (5, 7), **change}
    with pytest.raises(ConfigError, match=text):
        step_schedule(sgd(), **settings)


@pytest.mark.parametrize(
    ("change", "text"), [({"total_steps": 0}, "total_steps"), ({"power": 0.0}, "power"), ({"minimum": 2.0}, "minimum")]
)
def test_poly_schedule_refuses_bad_values(change, text):
    settings = {"warmup_steps": 3, "warmup_start": 0.1, "total_steps": 5, **change}
    with pytest.raises(ConfigError, match=text):
        poly_schedule(sgd(), **settings)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_steps": 3}, "warmup_steps must be below total_steps=3, got 3"),
        ({"minimum": -0.1}, r"minimum .* must lie in \[0, 1\], got -0\.1"),
        ({"warmup_start": 0.0}, "warmup_start"),
    ],
)
def test_cosine_schedule_refuses_bad_values(change, text):
    settings = {"warmup_steps": 3, "warmup_start": 0.1, "total_steps": 5, **change}
    with pytest.raises(ConfigError, match=text):
        cosine_schedule(sgd(), **settings)
