"""From the mask head's small squares to masks of the image.

Sampled bilinearly between the pixel centres of the float box, as the published models do; torchvision rounds the box
to whole pixels first, which costs small objects up to a third of their overlap.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Box = tuple[int, int, int, int]


def paste_masks(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Masks in the frame of the image.

    Args:
        masks: (N, 1, M, M) probabilities, each relative to its box.
        boxes: (N, 4) xyxy in pixels of the image.
        size_hw: (H, W) of the image.

    Returns:
        (N, 1, H, W) float probabilities, 0 away from the box. 0.5 is the published threshold, from which on a pixel
        belongs to the object.
    """
    height, width = size_hw
    pasted = [paste_window(mask[0], box, (0, 0, height, width)) for mask, box in zip(masks, boxes, strict=True)]
    return torch.stack(pasted)[:, None] if pasted else masks.new_zeros(0, 1, height, width)


def paste_window(mask: Tensor, box: Tensor, window: Box) -> Tensor:
    """One mask, only inside a window of the image.

    Args:
        mask: (M, M) probabilities.
        box: (4,) xyxy.
        window: (top, left, bottom, right) in whole pixels.

    Returns:
        (bottom - top, right - left) float.
    """
    top, left, bottom, right = window
    x1, y1, x2, y2 = box.unbind()
    y = _relative(torch.arange(top, bottom, device=mask.device, dtype=mask.dtype) + 0.5, y1, y2)
    x = _relative(torch.arange(left, right, device=mask.device, dtype=mask.dtype) + 0.5, x1, x2)
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
    return functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def _relative(centres: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Pixel centres in the frame of a box, -1 to 1 inside; 2 is far outside, as all are of a box without extent."""
    return torch.where(end > start, (centres - start) / (end - start) * 2 - 1, 2).clamp(-2, 2)


def masks_to_rle(masks: Tensor, boxes: Tensor, size_hw: tuple[int, int]) -> list[dict[str, object]]:
    """Binary masks of the image in COCO's run-length code; no tensor of the image's size times N ever exists.

    Args:
        masks: (N, 1, M, M) probabilities, each relative to its box.
        boxes: (N, 4) xyxy in pixels of the image.
        size_hw: (H, W) of the image.

    Returns:
        N dicts {"size": [H, W], "counts": str}, equal to encoding `paste_masks(…) >= 0.5`.
    """
    from pycocotools import mask as coco_mask

    height, width = size_hw
    canvas = np.zeros((height, width), dtype=np.uint8, order="F")
    codes = []
    for mask, box in zip(masks, boxes, strict=True):
        top, left, bottom, right = _pixels_touched(box, size_hw)
        inside = paste_window(mask[0], box, (top, left, bottom, right)) >= 0.5
        canvas[top:bottom, left:right] = inside.cpu().numpy()
        code = coco_mask.encode(canvas)
        codes.append({"size": [height, width], "counts": code["counts"].decode("ascii")})
        canvas[top:bottom, left:right] = 0
    return codes


def _pixels_touched(box: Tensor, size_hw: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = box.tolist()
    height, width = size_hw
    top, left = max(int(y1) - 1, 0), max(int(x1) - 1, 0)
    return top, left, max(min(int(y2) + 2, height), top), max(min(int(x2) + 2, width), left)
