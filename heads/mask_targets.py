"""What the mask head should see in each box, from masks that are kept only where the objects are.

An object is cut out of the frame in a window with a margin, and RoIAlign reads the window as it would read the whole
frame: beyond a border of the window that is not the image's there are zeros in both, at one that is the image's both
continue the same edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from swin_dense.box_masks import BoxMasks
from swin_dense.heads.fused_mask_targets import fused_mask_targets
from swin_dense.kernel_trial import check_equal, kernel_trial
from swin_dense.watched import operations_are_watched

# So many pixels of windows at once: 4 bytes each as float, 8 while they are gathered.
_PIXELS_AT_ONCE = 2**22


def batch_mask_targets(
    masks: Sequence[BoxMasks], boxes: Sequence[Tensor], matched: Sequence[Tensor], size: int
) -> Tensor:
    """`mask_targets` of all images, one after the other; on a GPU in one pass that the host does not wait for.

    Args:
        masks: Per image, of its objects.
        boxes: Per image (N_i, 4) xyxy in pixels; N in all.
        matched: Per image (N_i,) int64, the object of each box.
        size: M, the side of the mask head's output.

    Returns:
        (N, M, M) float, 0 or 1.
    """
    targets_of = fused_mask_targets if _is_fused(boxes[0], size) else mask_targets_image_by_image
    return targets_of(masks, boxes, matched, size)


def mask_targets_image_by_image(
    masks: Sequence[BoxMasks], boxes: Sequence[Tensor], matched: Sequence[Tensor], size: int
) -> Tensor:
    """`batch_mask_targets` by torchvision, on any device; on a GPU the host waits for each image."""
    return torch.cat([mask_targets(*image, size) for image in zip(masks, boxes, matched, strict=True)])


def _is_fused(boxes: Tensor, size: int) -> bool:
    if not boxes.is_cuda or boxes.dtype != torch.float32 or operations_are_watched():
        return False
    return fused_is_right(boxes.device, size)


@kernel_trial("mask targets are cut image by image, which is slower: the kernel for all images")
def fused_is_right(device: torch.device, size: int) -> None:
    """Whether `fused_mask_targets` does on this machine what `mask_targets` does on a CPU, for a few boxes.

    Args:
        device: A GPU.
        size: M.
    """
    generator = torch.Generator().manual_seed(0)
    frames = [torch.rand(count, 2 * size, 3 * size, generator=generator) < 0.6 for count in (3, 0, 2)]
    masks = [BoxMasks.from_full(frame) for frame in frames]
    # Bins of whole and half pixels, 1, 2 or 4 samples along each: no step is rounded, one half is one half.
    corners = torch.tensor([[-2.0, -1], [3, 5], [size + 1, 2]])
    boxes = [torch.cat((corners, corners + size * torch.tensor([[2.0, 1], [1, 1.5], [3.5, 1]])), dim=1)] * 3
    matched = [torch.tensor([2, 0, 1]), torch.zeros(3, dtype=torch.int64), torch.tensor([1, 0, 1])]
    wanted = mask_targets_image_by_image(masks, boxes, matched, size)
    got = fused_mask_targets(masks, [box.to(device) for box in boxes], [rows.to(device) for rows in matched], size)
    check_equal([got.cpu()], [wanted], allowed=0)


def mask_targets(masks: BoxMasks, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The mask of each box's object, resampled and made binary again.

    Args:
        masks: Of one image's objects.
        boxes: (N, 4) xyxy in pixels.
        matched: (N,) int64, the object of each box. Of an image without objects any number, which gives zeros.
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
    if len(masks) == 0:
        return resampled
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
