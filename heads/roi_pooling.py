"""Cut a box out of the pyramid level that fits its size.

RoIAlign: Mask R-CNN (He et al., 2017), https://arxiv.org/abs/1703.06870; the choice of the level: FPN, equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE

PUBLISHED_FINEST_SIDE = 56.0


class PyramidRoIAlign(MultiScaleRoIAlign):
    """RoIAlign as the published models have it: aligned to pixel centres, adaptive sampling, given strides.

    torchvision's pooler is not aligned, samples 2 x 2 points, and guesses the strides from the first batch it sees.

    Args:
        feature_specs: The levels to pool from, finest first.
        output_size: The side of the result in cells.
        finest_side: Boxes whose side (root of the area) is under twice this many pixels come from the finest level;
            each doubling is one level coarser.
    """

    def __init__(
        self, feature_specs: Mapping[str, FeatureSpec], output_size: int, finest_side: float = PUBLISHED_FINEST_SIDE
    ) -> None:
        super().__init__(list(feature_specs), output_size, sampling_ratio=0)
        self.strides = tuple(spec.stride for spec in feature_specs.values())
        self.finest_side = finest_side

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool every box of every image.

        Args:
            x: {name: (B, C, h, w)}.
            boxes: Per image (N_i, 4) xyxy in input pixels.
            image_shapes: Unused; part of torchvision's interface.

        Returns:
            (sum of N_i, C, output_size, output_size).
        """
        levels = [x[name] for name in self.featmap_names]
        image_of_box = torch.cat([box.new_full((len(box), 1), index) for index, box in enumerate(boxes)])
        rois = torch.cat((image_of_box, torch.cat(boxes)), dim=1).to(levels[0].dtype)
        level_of_box = self.level_of(rois[:, 1:])
        pooled = rois.new_zeros(len(rois), levels[0].shape[1], *self.output_size)
        for index, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            rows = (level_of_box == index).nonzero().squeeze(1)
            aligned = roi_align(level, rois[rows], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            pooled = pooled.index_copy(0, rows, aligned.to(pooled.dtype))
        return pooled

    def level_of(self, boxes: Tensor) -> Tensor:
        """The index of the level of each box: (N, 4) xyxy to (N,) int64."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.log2(side / self.finest_side + 1e-6).floor().long()
        return level.clamp(0, len(self.strides) - 1)


def published_pooling(
    feature_specs: Mapping[str, FeatureSpec], output_size: int, anchor_scale: float
) -> PyramidRoIAlign:
    """Pooling of the published models; boxes change level at sizes in proportion to the anchors'.

    Args:
        feature_specs: The levels to pool from, finest first.
        output_size: The side of the result in cells.
        anchor_scale: Anchor side over stride; 8 as published.
    """
    return PyramidRoIAlign(feature_specs, output_size, PUBLISHED_FINEST_SIDE * anchor_scale / PUBLISHED_ANCHOR_SCALE)
