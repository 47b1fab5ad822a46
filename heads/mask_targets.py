"""What the mask head should see in each box, from masks that are kept only where the objects are.

An object is cut out of the frame in a window with a margin, and RoIAlign reads the window as it would read the whole
frame: beyond a border of the window that is not the image's there are zeros in both, at one that is the image's both
continue the same edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from swin_dense.box_masks import BoxMasks

# So many pixels of windows at once: 4 bytes each as float, 8 while they are gathered.
_PIXELS_AT_ONCE = 2**22


def mask_targets(masks: BoxMasks, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The mask of each box's object, resampled and made binary again.

    Args:
        masks: Of one image's objects.
        boxes: (N, 4) xyxy in pixels.
        matched: (N,) int64, the object of each box.
        size: M, the side of the mask head's output.

    Returns:
        (N, M, M) float, 0 or 1.
    """
    return (resampled_masks(masks, boxes, matched, size) >= 0.5).to(boxes.dtype)


def resampled_masks(masks: BoxMasks, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """RoIAlign of each box in the mask of its object, aligned and with adaptive sampling, as the published models do.

    Arguments as for `mask_targets`.

    Returns:
        (N, M, M) float in [0, 1], as from masks of the whole image.
    """
    resampled = boxes.new_zeros(len(boxes), size, size)
    matched = matched.cpu()
    for group in _window_groups(masks, matched.unique()):
        rows = torch.isin(matched, group.objects).nonzero().squeeze(1)
        window = torch.searchsorted(group.objects, matched[rows])
        corners_xy = group.corners_xy[window].to(boxes)
        rows = rows.to(boxes.device)
        rois = torch.cat((window[:, None].to(boxes), boxes[rows] - corners_xy.repeat(1, 2)), dim=1)
        pixels = masks.windows(group.objects, group.corners_xy, group.size_hw)[:, None].to(boxes)
        aligned = roi_align(pixels, rois, (size, size), spatial_scale=1.0, sampling_ratio=0, aligned=True)
        resampled[rows] = aligned[:, 0]
    return resampled


@dataclass(frozen=True)
class _WindowGroup:
    """Windows of one size.

    Attributes:
        objects: (G,) int64, ascending.
        corners_xy: (G, 2) int64.
        size_hw: Of every window.
    """

    objects: Tensor
    corners_xy: Tensor
    size_hw: tuple[int, int]


def _window_groups(masks: BoxMasks, objects: Tensor) -> Iterator[_WindowGroup]:
    """Windows of few different sizes, each with an object and a margin of a pixel where the image goes on."""
    image_hw = torch.tensor(masks.image_size_hw)
    powers_of_two = 2 ** (masks.sizes_hw[objects] + 2).double().log2().ceil().long()
    sizes_hw = torch.minimum(powers_of_two, image_hw)
    corners_xy = torch.minimum(masks.corners_xy[objects] - 1, (image_hw - sizes_hw).flip(1)).clamp(min=0)
    kinds, kind_of_object = sizes_hw.unique(dim=0, return_inverse=True)
    for kind, (height, width) in enumerate(kinds.tolist()):
        for rows in (kind_of_object == kind).nonzero().squeeze(1).split(max(1, _PIXELS_AT_ONCE // (height * width))):
            yield _WindowGroup(objects[rows], corners_xy[rows], (height, width))
