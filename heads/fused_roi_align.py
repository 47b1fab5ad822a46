"""RoIAlign of boxes from all levels of a pyramid in one pass: `roi_align_kernels` as one torch operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swin_dense.errors import ConfigError
from swin_dense.kernel_import import import_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CELLS = 16  # of a row at a time: boxes are about 14 to 28 cells wide on the level that fits their size
_LARGEST_BLOCK = 256  # channels of a program


def fused_roi_align(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    output_size: int,
) -> Tensor:
    """Pool each box from its level, as `torchvision.ops.roi_align(aligned=True, sampling_ratio=0)` does.

    Runs on CUDA devices without waiting for them, and on the CPU in Triton's interpreter. Differentiable once, in the
    levels. All sums are in the dtype of the result; those of the gradient are atomic, in no fixed order, as
    torchvision's are. Boxes without an area pool zeros and cost next to nothing. A number that is not finite spreads to
    the whole row of bins that it is in, or that its gradient comes from.

    Args:
        levels: Each (B, C, h, w), all of float32, bfloat16, float16 or float64. Read as they are if in channels-last
            memory, otherwise copied.
        strides: Of each level, in input pixels.
        boxes: (N, 4) xyxy in input pixels.
        image_of_box: (N,) int64 in [0, B); not checked.
        level_of_box: (N,) int64, which of the levels; not checked.
        output_size: S, the side of the result in bins.

    Returns:
        (N, C, S, S) in channels-last memory, float64 of float64 levels, otherwise float32. Convolutions take it as it
        is; flattening it to (N, C S S) copies it.

    Raises:
        ConfigError: A shape, a dtype or a device does not fit, or Triton is missing.
    """
    _check(levels, strides, boxes, image_of_box, level_of_box, output_size)
    boxes = boxes.to(torch.promote_types(levels[0].dtype, torch.float32))
    return _roi_align(list(levels), list(strides), boxes, image_of_box, level_of_box, output_size)


def _check(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    output_size: int,
) -> None:
    if len(levels) == 0 or len(levels) != len(strides) or min(strides) < 1 or output_size < 1:
        raise ConfigError(
            "fused_roi_align: levels and strides must be equally many, strides and output_size at least 1, "
            f"got {len(levels)} levels, strides {tuple(strides)} and output_size {output_size}."
        )
    for level in levels:
        if level.ndim != 4 or level.shape[:2] != levels[0].shape[:2] or level.dtype not in _DTYPES:
            raise _unfit("each level", "(B, C, h, w) floats, B and C those of the first", level)
        if level.dtype != levels[0].dtype or level.device != levels[0].device:
            wanted = f"of {levels[0].dtype} on {levels[0].device}, as the first"
            raise _unfit("each level", wanted, level)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise _unfit("boxes", "(N, 4) floats", boxes)
    for name, index in (("image_of_box", image_of_box), ("level_of_box", level_of_box)):
        if index.shape != boxes.shape[:1] or index.dtype != torch.int64:
            raise _unfit(name, f"({len(boxes)},) of int64, one for each box", index)
    for name, tensor in (("boxes", boxes), ("image_of_box", image_of_box), ("level_of_box", level_of_box)):
        if tensor.device != levels[0].device:
            raise _unfit(name, f"on the device of the levels, {levels[0].device}", tensor)


def _unfit(name: str, wanted: str, got: Tensor) -> ConfigError:
    return ConfigError(
        f"fused_roi_align: {name} must be {wanted}, got {tuple(got.shape)} of {got.dtype} on {got.device}."
    )


@torch.library.custom_op("swin_dense::roi_align", mutates_args=())
def _roi_align(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    output_size: int,
) -> Tensor:
    bins = _empty_bins(levels, boxes, output_size)
    _launch("forward_kernel", [_cells(level) for level in levels], strides, boxes, image_of_box, level_of_box, bins)
    return bins.permute(0, 3, 1, 2)


@_roi_align.register_fake
def _(
    levels: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    output_size: int,
) -> Tensor:
    return _empty_bins(levels, boxes, output_size).permute(0, 3, 1, 2)


def _empty_bins(levels: Sequence[Tensor], boxes: Tensor, output_size: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], output_size, output_size, levels[0].shape[1]))


@torch.library.custom_op("swin_dense::roi_align_backward", mutates_args=())
def _roi_align_backward(
    out_gradient: Tensor,
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The gradients of the levels, of the dtype of theirs, in channels-last memory."""
    channels = out_gradient.shape[1]
    sums = [
        boxes.new_zeros((num_images, height, width, channels)) for height, width in zip(heights, widths, strict=True)
    ]
    _launch("backward_kernel", sums, strides, boxes, image_of_box, level_of_box, _cells(out_gradient))
    return [gradient.to(dtype).permute(0, 3, 1, 2) for gradient in sums]


@_roi_align_backward.register_fake
def _(
    out_gradient: Tensor,
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
) -> list[Tensor]:
    channels = out_gradient.shape[1]
    sizes_hw = zip(heights, widths, strict=True)
    return [
        boxes.new_empty((num_images, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
        for height, width in sizes_hw
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    levels, ctx.strides, *of_boxes, _ = inputs
    ctx.save_for_backward(*of_boxes)
    sizes_hw = [level.shape[2:] for level in levels]
    ctx.of_levels = levels[0].shape[0], [h for h, _ in sizes_hw], [w for _, w in sizes_hw], levels[0].dtype


def _backward(ctx: Any, out_gradient: Tensor) -> tuple[list[Tensor] | None, ...]:  # noqa: ANN401
    gradients = _roi_align_backward(out_gradient, ctx.strides, *ctx.saved_tensors, *ctx.of_levels)
    return gradients, None, None, None, None, None


_roi_align.register_autograd(_backward, setup_context=_save_for_backward)


def _cells(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h, w, C), contiguous: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _launch(
    name: str,
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image_of_box: Tensor,
    level_of_box: Tensor,
    bins: Tensor,
) -> None:
    """Run a kernel over contiguous maps (B, h, w, C) and bins (N, S, S, C)."""
    if bins.numel() == 0:
        return
    side, channels = bins.shape[2:]
    # tl.dot takes no fewer than 8 float32 to sum over, and the bins are what the gradient is summed over.
    powers = {"BINS": max(_power_of_two(side), 8), "BLOCK": min(max(_power_of_two(channels), 16), _LARGEST_BLOCK)}
    kernel = getattr(import_kernels("swin_dense.heads.roi_align_kernels", "fused_roi_align", boxes.device), name)
    with torch.cuda.device_of(boxes):
        kernel[(len(bins) * side, math.ceil(channels / powers["BLOCK"]))](
            tuple(maps),
            tuple(float(x.shape[1]) for x in maps),
            tuple(float(x.shape[2]) for x in maps),
            tuple(float(stride) for stride in strides),
            boxes.contiguous(),
            image_of_box.contiguous(),
            level_of_box.contiguous(),
            bins,
            SIDE=side,
            CELLS=_CELLS,
            CHANNELS=channels,
            **powers,
            num_warps=4,
            enable_fp_fusion=True,  # multiply-adds; Triton warns where this is left to it
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
