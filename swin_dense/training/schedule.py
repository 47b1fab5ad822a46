"""Learning-rate schedules as pure functions of the step: the factor on each group's own learning rate.

Step 0 is the first update. The linear warm-up MULTIPLIES the schedule below it, as in the code that trained the
published Swin models (mmcv 0.x and 1.x: lr = regular_lr(i) * (1 - (1 - i / warmup) * (1 - start))). So poly decay runs
from step 0 over all steps. mmsegmentation 1.x instead lets the decay begin after the warm-up; the two differ by at most
warmup / total, 1 % of the rate in the ADE20K recipe. Cosine decay does begin after the warm-up, as in the code of the
published classifiers (timm's scheduler with warmup_prefix).
"""

import math
from collections.abc import Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from swin_dense.errors import ConfigError


def warmup_factor(step: int, *, warmup_steps: int, warmup_start: float) -> float:
    """Linear rise from `warmup_start` at step 0 to 1 at `warmup_steps`, and 1 ever after."""
    if step >= warmup_steps:
        return 1.0
    return 1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_start)


def step_factor(step: int, *, warmup_steps: int, warmup_start: float, milestones: Sequence[int], gamma: float) -> float:
    """Warm-up, then a constant that is multiplied by `gamma` from each milestone on.

    Args:
        step: Number of updates already made.
        warmup_steps: Length of the warm-up in steps, 0 for none; published for COCO: 500.
        warmup_start: Factor at step 0; published for COCO: 0.001.
        milestones: Steps from which the rate drops; published for COCO: epochs 27 and 33 of 36.
        gamma: Factor per milestone; published: 0.1.

    Returns:
        Factor in (0, 1].
    """
    drops = sum(step >= milestone for milestone in milestones)
    return warmup_factor(step, warmup_steps=warmup_steps, warmup_start=warmup_start) * gamma**drops


def poly_factor(
    step: int, *, total_steps: int, warmup_steps: int, warmup_start: float, power: float = 1.0, minimum: float = 0.0
) -> float:
    """Warm-up times polynomial decay from 1 at step 0 to `minimum` at `total_steps`, where it stays.

    Args:
        step: Number of updates already made.
        total_steps: Step at which the decay ends; published for ADE20K: 160000.
        warmup_steps: Length of the warm-up in steps, 0 for none; published for ADE20K: 1500.
        warmup_start: Factor at step 0; published for ADE20K: 1e-6.
        power: 1 is a straight line, as published.
        minimum: Factor at the end; published: 0.

    Returns:
        Factor in [0, 1].
    """
    remaining = max(0.0, 1.0 - step / total_steps)
    decay = (1.0 - minimum) * remaining**power + minimum
    return warmup_factor(step, warmup_steps=warmup_steps, warmup_start=warmup_start) * decay


def cosine_factor(
    step: int, *, total_steps: int, warmup_steps: int, warmup_start: float, minimum: float = 0.0
) -> float:
    """Warm-up, and only then half a cosine from 1 to `minimum` at `total_steps`, where it stays.

    Args:
        step: Number of updates already made.
        total_steps: Step at which the decay ends; published for ImageNet: 300 epochs.
        warmup_steps: Length of the warm-up in steps, 0 for none; published for ImageNet: 20 epochs.
        warmup_start: Factor at step 0; published for ImageNet: 0.001.
        minimum: Factor at the end; published for ImageNet: 0.01.

    Returns:
        Factor in [0, 1].
    """
    done = min(1.0, max(0, step - warmup_steps) / (total_steps - warmup_steps))
    decay = minimum + (1.0 - minimum) * (1.0 + math.cos(math.pi * done)) / 2
    return warmup_factor(step, warmup_steps=warmup_steps, warmup_start=warmup_start) * decay


def step_schedule(
    optimizer: Optimizer, *, warmup_steps: int, warmup_start: float, milestones: Sequence[int], gamma: float = 0.1
) -> LambdaLR:
    """Puts `step_factor` on an optimiser; call `.step()` after each update.

    Raises:
        ConfigError: A value is outside its range, or the milestones do not rise.
    """
    _check_warmup(warmup_steps, warmup_start)
    if any(milestone < 1 for milestone in milestones) or list(milestones) != sorted(set(milestones)):
        raise ConfigError(f"milestones must be rising step numbers of at least 1, got {list(milestones)}.")
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma must be above 0 and at most 1, got {gamma}.")
    factor = partial(
        step_factor, warmup_steps=warmup_steps, warmup_start=warmup_start, milestones=tuple(milestones), gamma=gamma
    )
    return LambdaLR(optimizer, factor)


def poly_schedule(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_steps: int,
    warmup_start: float,
    power: float = 1.0,
    minimum: float = 0.0,
) -> LambdaLR:
    """Puts `poly_factor` on an optimiser; call `.step()` after each update.

    Raises:
        ConfigError: A value is outside its range.
    """
    _check_warmup(warmup_steps, warmup_start)
    if total_steps < 1:
        raise ConfigError(f"total_steps must be at least 1, got {total_steps}.")
    if power <= 0.0:
        raise ConfigError(f"power must be above 0, got {power}.")
    _check_minimum(minimum)
    factor = partial(
        poly_factor,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start,
        power=power,
        minimum=minimum,
    )
    return LambdaLR(optimizer, factor)


def cosine_schedule(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int, warmup_start: float, minimum: float = 0.0
) -> LambdaLR:
    """Puts `cosine_factor` on an optimiser; call `.step()` after each update.

    Raises:
        ConfigError: A value is outside its range.
    """
    _check_warmup(warmup_steps, warmup_start)
    _check_minimum(minimum)
    if total_steps <= warmup_steps:
        raise ConfigError(
            f"warmup_steps must be below total_steps={total_steps}, got {warmup_steps}. Shorten the warm-up."
        )
    factor = partial(
        cosine_factor,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        warmup_start=warmup_start,
        minimum=minimum,
    )
    return LambdaLR(optimizer, factor)


def _check_minimum(minimum: float) -> None:
    if not 0.0 <= minimum <= 1.0:
        raise ConfigError(f"minimum is a factor on the learning rate and must lie in [0, 1], got {minimum}.")


def _check_warmup(warmup_steps: int, warmup_start: float) -> None:
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps must not be negative, got {warmup_steps}.")
    if not 0.0 < warmup_start <= 1.0:
        raise ConfigError(f"warmup_start is a factor on the learning rate and must lie in (0, 1], got {warmup_start}.")
