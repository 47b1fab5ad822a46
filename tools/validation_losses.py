"""The losses of a validation set from those of its images, however the images were shared among processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from swin_dense.training.loss_terms import LossTerm


class ValidationLosses:
    """Collects the named losses of single images; processes collect apart and merge."""

    def __init__(self) -> None:
        self._of_images: dict[int, dict[str, tuple[float, int]]] = {}

    def add(self, index: int, terms: Mapping[str, LossTerm]) -> None:
        """Take the losses of one image."""
        values = torch.stack([term.mean for term in terms.values()]).tolist()
        counts = [int(term.count) for term in terms.values()]
        self._of_images[index] = dict(zip(terms, zip(values, counts, strict=True), strict=True))

    def merge(self, other: ValidationLosses) -> None:
        """Take what another process has collected."""
        self._of_images |= other._of_images

    def means(self) -> dict[str, float]:
        """Each loss of the set taken as one batch: a mean over its sampled boxes, objects, pixels or images.

        So images with more of these weigh more, and an image without objects does not lower the mask loss. The sums are
        exact, so that the order of the images does not matter.
        """
        images = list(self._of_images.values())
        names = list(images[0]) if images else []
        return {name: _mean([image[name] for image in images]) for name in names}


def _mean(means_and_counts: list[tuple[float, int]]) -> float:
    values = [mean * count for mean, count in means_and_counts]
    if not all(map(math.isfinite, values)):
        return math.nan
    return math.fsum(values) / max(1, sum(count for _, count in means_and_counts))


def with_total(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses after their sum, "loss", as a row of metrics.csv has those of training."""
    return {"loss": sum(losses.values()), **losses} if losses else {}
