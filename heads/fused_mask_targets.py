"""What the mask head should see in the boxes of a whole batch, in one pass: `mask_target_kernels` as a torch operator.

The same function as `mask_targets.mask_targets`, image by image, but the pixels of a mask are read where they lie, and
nothing comes back from the GPU: neither the objects of the boxes nor how large their windows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swin_dense.box_masks import BoxMasks
from swin_dense.errors import ConfigError
from swin_dense.kernel_import import import_kernels

_BLOCK = 128  # bins of a program, one per thread: a large box keeps several programs busy
_TABLE_COLUMNS = 7


def fused_mask_targets(
    masks: Sequence[BoxMasks], boxes: Sequence[Tensor], matched: Sequence[Tensor], size: int
) -> Tensor:
    """The masks of all boxes' objects, resampled and made binary again.

    Runs on CUDA devices, and on the CPU in Triton's interpreter. Computes in float32 what `torchvision.ops.roi_align`
    (aligned, adaptive sampling) computes on a CPU from masks of the whole image, step by step. Not differentiable.

    Args:
        masks: Per image.
        boxes: Per image (N_i, 4) xyxy in pixels, float32; N in all. One whose right or lower end comes first gives
            zeros.
        matched: Per image (N_i,) int64, the object of each box. Of an image without objects 0, which gives zeros.
        size: M, the side of the mask head's output.

    Returns:
        (N, M, M) float32, 0 or 1.

    Raises:
        ConfigError: The boxes are not float32 or not on a CUDA device, or Triton is missing.
    """
    all_boxes = torch.cat([image_boxes.detach() for image_boxes in boxes])
    if all_boxes.dtype != torch.float32:
        raise ConfigError(f"fused_mask_targets: boxes must be float32, got {all_boxes.dtype}.")
    device = all_boxes.device
    pixels = torch.cat([image_masks.pixels.to(device, non_blocking=True) for image_masks in masks])
    table, first_rows = _mask_table(masks), _first_rows(masks, [len(image_boxes) for image_boxes in boxes])
    return _mask_targets(pixels, table, all_boxes, torch.cat(list(matched)), first_rows, size)


def _mask_table(masks: Sequence[BoxMasks]) -> Tensor:
    """(R, 7) int64: start among all images' pixels, height, width, left, top of each mask; height, width of its image.

    An image without objects has one row of zeros: a mask without pixels.
    """
    parts, first_pixel = [], 0
    for image in masks:
        image_hw = torch.tensor([image.image_size_hw]).expand(len(image), 2)
        part = torch.cat((image.starts[:, None] + first_pixel, image.sizes_hw, image.corners_xy, image_hw), dim=1)
        parts.append(part if len(image) else part.new_zeros(1, _TABLE_COLUMNS))
        first_pixel += len(image.pixels)
    return torch.cat(parts)


def _first_rows(masks: Sequence[BoxMasks], num_boxes: Sequence[int]) -> Tensor:
    """(N,) int64: for each box where in the table its image begins."""
    num_rows = torch.tensor([max(len(image), 1) for image in masks])
    return (num_rows.cumsum(0) - num_rows).repeat_interleave(torch.tensor(num_boxes))


@torch.library.custom_op("swin_dense::mask_targets", mutates_args=())
def _mask_targets(
    pixels: Tensor, table: Tensor, boxes: Tensor, matched: Tensor, first_rows: Tensor, size: int
) -> Tensor:
    """`table` and `first_rows` are on the CPU, all else is on one device."""
    targets = boxes.new_empty((len(boxes), size, size))
    if targets.numel() > 0:
        kernels = import_kernels("swin_dense.heads.mask_target_kernels", "fused_mask_targets", boxes.device)
        grid = (len(boxes), math.ceil(size * size / _BLOCK))
        with torch.cuda.device_of(boxes):
            kernels.mask_target_kernel[grid](
                pixels,
                _brought_to(boxes.device, table),
                boxes.contiguous(),
                matched.contiguous(),
                _brought_to(boxes.device, first_rows),
                targets,
                COLUMNS=_TABLE_COLUMNS,
                SIZE=size,
                BLOCK=_BLOCK,
                num_warps=_BLOCK // 32,
                enable_fp_fusion=False,  # each step is rounded, as on CPUs
            )
    return targets


@_mask_targets.register_fake
def _(pixels: Tensor, table: Tensor, boxes: Tensor, matched: Tensor, first_rows: Tensor, size: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], size, size))


def _brought_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Without waiting: a GPU copies from pinned memory when it comes to it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
