"""Score a predictor on a validation set, shared among all processes; `train`, `evaluate` and `demo` call this."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from swin_dense.tools.predictors import Predictor
from swin_dense.tools.tasks import Scores, ValidationData
from swin_dense.tools.validation_losses import ValidationLosses
from swin_dense.training.distributed import Process, gather_objects
from swin_dense.training.loss_terms import LossTerm


def evaluate(
    predictor: Predictor[Any],
    validation: ValidationData[Any],
    process: Process,
    *,
    workers: int = 0,
    with_losses: bool = False,
    predictions: Path | None = None,
    on_prediction: Callable[[int, Any], None] | None = None,
) -> Scores | None:
    """Predict and score every image.

    Args:
        predictor: The model; in evaluation mode.
        validation: Annotated images.
        process: This process; each takes its share of the images.
        workers: Processes that read and resize images.
        with_losses: Compute the losses of the images too, from the same pass; predictions stay the same bit for bit. A
            model that sees tiles, windows or several views of an image has none, nor has one with soft suppression:
            only its scores are given.
        predictions: Where to save the predictions, or None.
        on_prediction: Gets the index and the prediction of each image of this process.

    Returns:
        The scores in the main process, None in the others. "losses" among them are those of `ValidationLosses.means`.
    """
    with_losses = with_losses and predictor.gives_losses
    losses = ValidationLosses()
    evaluator = validation.evaluator(predictions)
    share = range(process.rank, len(validation.paths), process.world_size)
    for index, prediction, terms in _predictions(predictor, validation, share, workers, with_losses):
        evaluator.add(index, prediction)
        if with_losses:
            losses.add(index, terms)
        if on_prediction is not None:
            on_prediction(index, prediction)
    evaluators = gather_objects(evaluator)
    all_losses = gather_objects(losses) if with_losses else []
    if evaluators is None or all_losses is None:
        return None
    for other in evaluators[1:]:
        evaluator.merge(other)
    scores = evaluator.finish()
    if not with_losses:
        return scores
    for others in all_losses[1:]:
        losses.merge(others)
    return {**scores, "losses": losses.means()}


def _predictions(
    predictor: Predictor[Any], validation: ValidationData[Any], share: Sequence[int], workers: int, with_losses: bool
) -> Iterator[tuple[int, Any, Mapping[str, LossTerm]]]:
    paths = [validation.paths[index] for index in share]
    sizes_hw = [validation.sizes_hw[index] for index in share]
    if with_losses:
        target_of = partial(_target, validation, share)
        for position, prediction, terms in predictor.predict_annotated(paths, sizes_hw, target_of, workers):
            yield share[position], prediction, terms
        return
    for position, prediction in predictor.predict_files(paths, sizes_hw, workers):
        yield share[position], prediction, {}


def _target(validation: ValidationData[Any], share: Sequence[int], position: int, size_hw: tuple[int, int]) -> Any:  # noqa: ANN401
    return validation.target(share[position], size_hw)


def default_workers(process: Process) -> int:
    """Loader processes of one training process: the cores' share beside a GPU; none where the cores do the training."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if process.device.type == "cpu":
        return 0
    return max(1, min(8, cores // max(1, process.world_size)))


def flat(scores: Mapping[str, float | None], prefix: str) -> dict[str, float | None]:
    """Score names as columns of metrics.csv: "mask AP50" becomes "<prefix>_mask_AP50"."""
    return {f"{prefix}_{name.replace(' ', '_')}": value for name, value in scores.items()}


def spread(count: int, of: int) -> list[int]:
    """`count` indices spread evenly over range(of), the first and the last among them."""
    return sorted({int(index) for index in np.linspace(0, of - 1, min(count, of)).round()}) if of else []
