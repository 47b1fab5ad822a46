"""Cut a box out of the pyramid level that fits its size.

RoIAlign: Mask R-CNN (He et al., 2017), https://arxiv.org/abs/1703.06870; the choice of the level: FPN, equation 1.
`reference_roi_align` is its readable definition; GPUs pool from all levels at once, by `fused_roi_align`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from swin_dense.features import FeatureSpec
from swin_dense.heads.anchors import PUBLISHED_ANCHOR_SCALE
from swin_dense.heads.box_batches import EMPTY_BOX
from swin_dense.heads.fused_roi_align import fused_roi_align
from swin_dense.heads.precision import at_least_float32
from swin_dense.kernel_trial import check_equal, kernel_trial
from swin_dense.watched import operations_are_watched

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
            x: {name: (B, C, h, w)}, floats of any one dtype.
            boxes: Per image (N_i, 4) xyxy in input pixels.
            image_shapes: Unused; part of torchvision's interface.

        Returns:
            (sum of N_i, C, output_size, output_size), at least float32, in any memory format.
        """
        levels = [x[name] for name in self.featmap_names]
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        image_of_box = torch.cat(
            [box.new_full((len(box),), index, dtype=torch.int64) for index, box in enumerate(boxes)]
        )
        all_boxes = torch.cat(boxes).to(dtype)
        align = fused_roi_align if _is_fused(levels, self.output_size[0]) else reference_roi_align
        return align(levels, self.strides, all_boxes, image_of_box, self.level_of(all_boxes), self.output_size[0])

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


def reference_roi_align(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    output_size: int,
) -> Tensor:
    """RoIAlign of torchvision, level by level.

    Args:
        levels: Each (B, C, h, w).
        strides: Of each level, in input pixels.
        boxes: (N, 4) xyxy in input pixels, of the dtype of the levels, and at least float32.
        image_of_box: (N,) int64.
        level_of_box: (N,) int64.
        output_size: S, the side of the result in cells.

    Returns:
        (N, C, S, S) of the dtype of the boxes.
    """
    rois = torch.cat((image_of_box[:, None].to(boxes.dtype), boxes), dim=1)
    pooled = boxes.new_zeros(len(boxes), levels[0].shape[1], output_size, output_size)
    for index, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        rows = (level_of_box == index).nonzero().squeeze(1)
        aligned = roi_align(
            at_least_float32(level), rois[rows], output_size, 1 / stride, sampling_ratio=0, aligned=True
        )
        pooled = pooled.index_copy(0, rows, aligned.to(pooled.dtype))
    return pooled


def _is_fused(levels: Sequence[Tensor], output_size: int) -> bool:
    # Its gradients are sums in no fixed order; torchvision's, where algorithms are to be deterministic, are not.
    level = levels[0]
    if not level.is_cuda or torch.are_deterministic_algorithms_enabled() or operations_are_watched():
        return False
    return fused_is_right(level.device, level.dtype, len(levels), level.shape[1], output_size)


@kernel_trial("RoIAlign goes level by level, which is slower: the fused one")
def fused_is_right(
    device: torch.device, dtype: torch.dtype, num_levels: int, num_channels: int, output_size: int
) -> None:
    """Whether `fused_roi_align` does on this machine what `reference_roi_align` does, on small levels.

    Args:
        device: A GPU.
        dtype: Of the levels.
        num_levels: How many there are.
        num_channels: C.
        output_size: S.
    """
    generator = torch.Generator().manual_seed(0)
    strides = [4 * 2**index for index in range(num_levels)]
    levels = [torch.randn(2, num_channels, 11 + index, 17 - index, generator=generator) for index in range(num_levels)]
    levels = [level.to(device, dtype).requires_grad_() for level in levels]
    rows = torch.arange(3 * num_levels)
    image_of_box, level_of_box = rows % 2, rows % num_levels
    corners = (torch.rand(len(rows), 2, 2, generator=generator) * 25 - 5).sort(dim=1).values  # in cells
    boxes = corners.flatten(1) * torch.tensor(strides)[level_of_box, None]
    boxes[0] = torch.tensor(EMPTY_BOX)
    of_boxes = (
        boxes.to(device, torch.promote_types(dtype, torch.float32)),
        image_of_box.to(device),
        level_of_box.to(device),
    )

    def with_gradients(align: Callable[..., Tensor]) -> list[Tensor]:
        pooled = align(levels, strides, *of_boxes, output_size)
        return [pooled.detach(), *torch.autograd.grad(pooled, levels, torch.ones_like(pooled))]

    allowed = 1e-2 if dtype.itemsize == 2 else 1e-4  # gradients are rounded to the dtype
    check_equal(with_gradients(fused_roi_align), with_gradients(reference_roi_align), allowed)
