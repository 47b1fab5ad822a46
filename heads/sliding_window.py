"""Segmentation of an image in windows of the size trained on, as mmsegmentation's mode "slide" does.

Windows count alike wherever they overlap, and all logits are held at once: for images of the size that models are
tested at. Larger images go in tiles (`tools/tiled_prediction.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swin_dense.errors import ConfigError


@dataclass(frozen=True)
class SlidingWindow:
    """Windows at a constant stride; the last ones of a row and of a column are moved back into the image.

    Attributes:
        size_hw: (height, width) of a window; that of the image where the image is smaller.
        stride_hw: From one window to the next.

    Raises:
        ConfigError: A length is not positive, or windows would leave gaps.
    """

    size_hw: tuple[int, int]
    stride_hw: tuple[int, int]

    def __post_init__(self) -> None:
        if any(not 0 < stride <= side for side, stride in zip(self.size_hw, self.stride_hw, strict=True)):
            raise ConfigError(
                f"sliding window: slide_stride_hw must be 1 or more and no longer than slide_crop_hw, "
                f"got {list(self.stride_hw)} for {list(self.size_hw)}."
            )

    def __call__(self, images: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of the logits that the windows give a pixel.

        Args:
            images: (B, 3, H, W).
            logits_of: (B, 3, h, w) to (B, K, h, w).

        Returns:
            (B, K, H, W).
        """
        size_hw = (images.shape[2], images.shape[3])
        height, width = (min(side, own) for side, own in zip(size_hw, self.size_hw, strict=True))
        total, count = torch.empty(0), images.new_zeros(size_hw)
        for top in window_starts(size_hw[0], height, self.stride_hw[0]):
            for left in window_starts(size_hw[1], width, self.stride_hw[1]):
                window = (..., slice(top, top + height), slice(left, left + width))
                logits = logits_of(images[window])
                if not total.numel():
                    total = logits.new_zeros(*logits.shape[:2], *size_hw)
                total[window] += logits
                count[window] += 1
        return total / count


def window_starts(side: int, window_side: int, stride: int) -> Sequence[int]:
    """The first pixel of each window along one side of an image that is no shorter than a window."""
    return [min(start, side - window_side) for start in range(0, side - window_side + stride, stride)]


def sliding_window(size_hw: tuple[int, int] | None, stride_hw: tuple[int, int] | None = None) -> SlidingWindow | None:
    """Windows of a size, or none at all.

    Args:
        size_hw: (height, width) of a window; None sees images whole.
        stride_hw: From one window to the next; None is two thirds of the window: 341 of 512, 426 of 640, as in the
            configurations of BEiT and ConvNeXt. The published Swin models were tested whole.

    Raises:
        ConfigError: A length is out of range, or there is a stride without a window.
    """
    if size_hw is None:
        if stride_hw is not None:
            raise ConfigError(f"sliding window: slide_stride_hw={list(stride_hw)} needs slide_crop_hw.")
        return None
    return SlidingWindow(size_hw, stride_hw or (2 * size_hw[0] // 3, 2 * size_hw[1] // 3))
