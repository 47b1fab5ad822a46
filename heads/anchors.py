"""The anchor boxes of every cell of every pyramid level.

Faster R-CNN (Ren et al., 2015), https://arxiv.org/abs/1506.01497; one size per level as in the FPN paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from swin_dense.features import FeatureSpec
from swin_dense.heads.box_batches import beside

PUBLISHED_ANCHOR_SCALE = 8.0


class PyramidAnchors(nn.Module):
    """Anchors as the published models have them: float corners on exact strides, centred on the cell's corner.

    torchvision's generator rounds the corners and divides the image by the grid to get a stride, which moves the
    coarsest anchors by up to 36 pixels.

    Args:
        feature_specs: The pyramid's levels, finest first.
        scale: Anchor side over stride; 8 in the published configurations.
        aspect_ratios: Height over width of each anchor.
    """

    def __init__(
        self,
        feature_specs: Mapping[str, FeatureSpec],
        scale: float = PUBLISHED_ANCHOR_SCALE,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        super().__init__()
        self.strides = tuple(spec.stride for spec in feature_specs.values())
        self.scale = scale
        self.aspect_ratios = tuple(aspect_ratios)

    def num_anchors_per_location(self) -> list[int]:
        """The number of anchors of one cell, level by level."""
        return [len(self.aspect_ratios)] * len(self.strides)

    def forward(self, images: ImageList, levels: list[Tensor]) -> list[Tensor]:
        """All anchors, once per image.

        Args:
            images: The batch; only its length counts.
            levels: (B, C, h, w) each, finest first.

        Returns:
            Per image (A, 4) float32 xyxy in input pixels: level by level, row by row, cell by cell, ratio by ratio.
        """
        device = levels[0].device
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        anchors = torch.cat(
            [
                self._level_anchors(stride, (level.shape[-2], level.shape[-1]), dtype, device)
                for stride, level in zip(self.strides, levels, strict=True)
            ]
        )
        return [anchors] * len(images.image_sizes)

    def cell_anchors(self, stride: int) -> list[tuple[float, float, float, float]]:
        """The anchors of the cell at the origin, xyxy in pixels."""
        side = self.scale * stride
        sizes = [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for ratio in self.aspect_ratios]
        return [(-width / 2, -height / 2, width / 2, height / 2) for width, height in sizes]

    def _level_anchors(self, stride: int, grid_hw: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        y = torch.arange(grid_hw[0], dtype=dtype, device=device) * stride
        x = torch.arange(grid_hw[1], dtype=dtype, device=device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
        return (corners + beside(self.cell_anchors(stride), corners)).view(-1, 4)
