"""How a model sees an image: resized, or resized in several ways and flipped, for results that are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swin_dense.datasets.classification_transforms import ClassificationTransform
from swin_dense.datasets.instances import Instances
from swin_dense.datasets.semantic_transforms import SemanticTransform, semantic_inference
from swin_dense.datasets.transforms import InstanceTransform, instance_inference
from swin_dense.errors import ConfigError
from swin_dense.tools.recipe import InferenceSettings

Resizing = InstanceTransform | SemanticTransform | ClassificationTransform


@dataclass(frozen=True)
class Views:
    """The views of an image.

    Attributes:
        resizings: One for each size.
        with_flipped: Each size comes once more with left and right exchanged.
    """

    resizings: Sequence[Resizing]
    with_flipped: bool = False

    def only_resizing(self) -> Resizing | None:
        """The resizing of the one view, or None where there are several."""
        return self.resizings[0] if len(self.resizings) == 1 and not self.with_flipped else None


def instance_views(settings: InferenceSettings) -> Views:
    """The views of a detector.

    Raises:
        ConfigError: A number is out of range, or tiles are asked for as well.
    """
    if not settings.augmented:
        return Views([instance_inference(settings.short_edge, settings.max_long_edge)])
    _require_whole_images(settings)
    if not settings.augmented_short_edges:
        raise ConfigError("inference.augmented_short_edges must hold one length or more, got none.")
    cap = settings.augmented_max_long_edge
    return Views([instance_inference(edge, cap) for edge in settings.augmented_short_edges], settings.augmented_flip)


def semantic_views(settings: InferenceSettings) -> Views:
    """The views of a segmenter.

    Ratios multiply the bounds of the one size, as where the published scores were made; mmsegmentation 1.x multiplies
    the size of the original instead.

    Raises:
        ConfigError: A number is out of range, or tiles are asked for as well.
    """
    if not settings.augmented:
        return Views([semantic_inference(settings.scale)])
    _require_whole_images(settings)
    ratios = settings.augmented_ratios
    if not ratios or min(ratios) <= 0:
        raise ConfigError(f"inference.augmented_ratios must be one positive number or more, got {list(ratios)}.")
    long, short = settings.scale
    return Views([semantic_inference((int(long * r), int(short * r))) for r in ratios], settings.augmented_flip)


def _require_whole_images(settings: InferenceSettings) -> None:
    if settings.tile_size is not None:
        raise ConfigError(
            f"inference.augmented is for whole images, inference.tile_size={settings.tile_size} for tiles of them; "
            "set one to null or false."
        )


def resized(image: np.ndarray, resize: Resizing | None) -> Tensor:
    """(H, W, 3) uint8 to (3, h, w) uint8 at the model's size; None gives the same pixels, without a copy."""
    if resize is None:
        return torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)
    size_hw = (image.shape[0], image.shape[1])
    if isinstance(resize, ClassificationTransform):
        image = resize(image, seed=0)
    elif isinstance(resize, InstanceTransform):
        image, _ = resize(image, Instances.empty(size_hw), seed=0)
    else:
        image, _ = resize(image, np.zeros(size_hw, np.uint8), seed=0)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
