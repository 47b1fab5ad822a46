"""What every head does with its first argument, and with images before the backbone sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swin_dense.config import STAGE_NAMES, SwinConfig, variant_config
from swin_dense.conventions import IMAGENET_MEAN, IMAGENET_STD
from swin_dense.errors import ConfigError
from swin_dense.swin import SwinTransformer


def as_backbone(backbone: str | SwinConfig | SwinTransformer) -> SwinTransformer:
    """A variant name or a configuration becomes a new backbone, a backbone stays itself.

    Raises:
        ConfigError: The variant is unknown, or the backbone lacks one of the maps c2 to c5 that the heads read.
    """
    if isinstance(backbone, str):
        backbone = variant_config(backbone)
    if isinstance(backbone, SwinConfig):
        backbone = SwinTransformer(backbone)
    missing = [name for name in STAGE_NAMES if name not in backbone.feature_specs]
    if missing:
        raise ConfigError(
            f"the heads read the maps {', '.join(STAGE_NAMES)}; this backbone has no {', '.join(missing)}."
        )
    return backbone


class Normalize(nn.Module):
    """Shift and scale each image channel.

    Args:
        in_channels: The number of channels.
        mean: The mean of each channel; None is ImageNet's and fits 3 channels only.
        std: The standard deviation of each channel, likewise.

    Raises:
        ConfigError: The lengths differ, or the defaults do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if (mean is None or std is None) and in_channels != 3:
            raise ConfigError(f"image_mean and image_std are needed for {in_channels} channels; only 3 have a default.")
        for name, values in (("image_mean", mean), ("image_std", std)):
            if values is not None and len(values) != in_channels:
                raise ConfigError(f"{name} must have {in_channels} numbers, got {len(values)}.")
        self.register_buffer("mean", torch.tensor(mean or IMAGENET_MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or IMAGENET_STD).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(..., in_channels, H, W) in [0, 1] to the same shape, normalised.

        Raises:
            ConfigError: The number of channels or the dtype is wrong.
        """
        channels = self.mean.shape[0]
        if images.ndim < 3 or images.shape[-3] != channels or not images.is_floating_point():
            raise ConfigError(
                f"images must be ({channels}, H, W) floats in [0, 1], "
                f"got {tuple(images.shape)} of {images.dtype}; divide 8-bit pictures by 255."
            )
        return (images - self.mean) / self.std
