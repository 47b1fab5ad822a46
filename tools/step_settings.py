"""What a recipe comes to on this machine: shares of a batch, precision, learning rate and schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from swin_dense.errors import ConfigError
from swin_dense.tools.recipe import Recipe, ScheduleSettings
from swin_dense.training.schedule import cosine_schedule, poly_schedule, step_schedule


def split_batch(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """How a step's images are shared: the micro-batch of one process, and how many of these make a step.

    Raises:
        ConfigError: The batch does not divide.
    """
    total, micro = recipe.optimizer.batch_size, recipe.optimizer.micro_batch_size
    if micro is None:
        micro = total // world_size
    if micro < 1 or total % (micro * world_size):
        given = recipe.optimizer.micro_batch_size
        part = "" if given is None else f" x optimizer.micro_batch_size={given}"
        raise ConfigError(
            f"optimizer.batch_size={total} must be a multiple of {world_size} processes{part}; change one of them."
        )
    return micro, total // (micro * world_size)


def optimizer_text(recipe: Recipe) -> str:
    """The learning rate, what became of the recipe's where the batch is another, and what else is unusual."""
    settings, steps = recipe.optimizer, recipe.schedule.steps
    reference, batch_size = settings.reference_batch_size, settings.batch_size
    text = f"learning rate {settings.learning_rate:g}"
    if reference is not None and reference != batch_size:
        text += f" for {reference} images, {settings.scaled_learning_rate():g} for {batch_size}"
        if steps is not None:
            equal = round(steps * reference / batch_size)
            text += f" (schedule.steps={equal} sees as many images as {steps} steps of {reference})"
    if settings.layer_decay != 1.0:
        text += f", layer decay {settings.layer_decay:g}"
    if settings.average_decay is not None:
        text += f", evaluated is the average of the weights (decay {settings.average_decay:g})"
    return text


def resolve_precision(
    wanted: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Literal["float32", "bfloat16"]:
    """The precision to train in: what is wanted, or for "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def build_schedule(optimizer: AdamW, settings: ScheduleSettings, steps_per_epoch: int, total_steps: int) -> LRScheduler:
    """The schedule of a recipe, milestones turned into steps."""
    if settings.decay == "poly":
        return poly_schedule(
            optimizer,
            total_steps=total_steps,
            warmup_steps=settings.warmup_steps,
            warmup_start=settings.warmup_start,
            power=settings.power,
            minimum=settings.minimum_factor,
        )
    if settings.decay == "cosine":
        return cosine_schedule(
            optimizer,
            total_steps=total_steps,
            warmup_steps=settings.warmup_steps,
            warmup_start=settings.warmup_start,
            minimum=settings.minimum_factor,
        )
    unit = steps_per_epoch if settings.epochs is not None else 1
    return step_schedule(
        optimizer,
        warmup_steps=settings.warmup_steps,
        warmup_start=settings.warmup_start,
        milestones=[milestone * unit for milestone in settings.milestones],
    )
