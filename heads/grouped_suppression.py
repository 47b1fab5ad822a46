"""Non-maximum suppression of many groups of boxes at once, such as the levels or classes of all images of a batch.

On a GPU nothing comes back to the host, which therefore need not wait.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torchvision.ops import nms

from swin_dense.errors import ConfigError
from swin_dense.kernel_trial import WrongResult, kernel_trial

_BLOCKS = {torch.float32: 64, torch.float64: 32}  # boxes that a kernel compares with as many others at a time
_WARPS = 16  # so that these comparisons stay in registers (as compiled for compute capability 9.0)


def grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """Which boxes stay when those of one group suppress each other.

    A box stays unless a better box of its group, which itself stays, overlaps it by more than `iou`. Of equal scores
    that of the earlier row is the better. Overlaps are rounded as in `torchvision.ops.nms` on a CPU, so each group
    keeps what that keeps of it alone. One operator for compilers, without gradients. Memory grows with N and
    num_groups, whatever the sizes of groups: on a GPU some 16 numbers for a box and one for a group.

    Args:
        boxes: (N, 4) xyxy, float32 or float64.
        scores: (N,) floats. Boxes with -inf are empty places: they neither stay nor suppress.
        groups: (N,) int64 from 0 to num_groups - 1; rows of other groups are empty places too.
        num_groups: Groups, empty ones counted.
        iou: From 0 to 1.

    Returns:
        (N,) bool.

    Raises:
        ConfigError: A shape, a dtype, a device or `iou` does not fit.
    """
    return _grouped_nms(boxes.detach(), scores.detach(), groups, num_groups, iou)


@torch.library.custom_op("swin_dense::grouped_nms", mutates_args=())
def _grouped_nms(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    _check(boxes, scores, groups, iou)
    if boxes.is_cuda and kernel_is_right(boxes.device, boxes.dtype):
        return nms_by_kernel(boxes, scores, groups, num_groups, iou)
    return nms_group_by_group(boxes, scores, groups, num_groups, iou)


@_grouped_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    return torch.empty_like(groups, dtype=torch.bool, memory_format=torch.contiguous_format)


def _check(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype not in _BLOCKS:
        raise _unfit("boxes", "(N, 4) of float32 or float64", boxes)
    if scores.shape != boxes.shape[:1] or not scores.is_floating_point():
        raise _unfit("scores", f"({len(boxes)},) floats, one for each box", scores)
    if groups.shape != boxes.shape[:1] or groups.dtype != torch.int64:
        raise _unfit("groups", f"({len(boxes)},) of int64, one for each box", groups)
    for name, tensor in (("scores", scores), ("groups", groups)):
        if tensor.device != boxes.device:
            raise ConfigError(
                f"grouped_nms: {name} must be on the device of boxes, {boxes.device}, got {tensor.device}."
            )
    if not 0 <= iou <= 1:
        raise ConfigError(f"grouped_nms: iou must be from 0 to 1, got {iou}.")


def _unfit(name: str, wanted: str, got: Tensor) -> ConfigError:
    return ConfigError(f"grouped_nms: {name} must be {wanted}, got {tuple(got.shape)} of {got.dtype}.")


def nms_group_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """`grouped_nms` by torchvision, on any device: one call, and on a GPU one wait, for each group that has boxes."""
    order, starts = _by_group_and_score(scores, groups, num_groups)
    bounds = starts.unique_consecutive().tolist()
    sizes = [end - start for start, end in pairwise(bounds)]
    order = order[bounds[0] : bounds[-1]]
    parts = zip(boxes[order].split(sizes), scores[order].to(boxes.dtype).split(sizes), order.split(sizes), strict=True)
    kept = [rows[nms(group_boxes, group_scores, iou)] for group_boxes, group_scores, rows in parts]
    keep = torch.zeros_like(groups, dtype=torch.bool)
    if kept:
        keep[torch.cat(kept)] = True
    return keep


def nms_by_kernel(boxes: Tensor, scores: Tensor, groups: Tensor, num_groups: int, iou: float) -> Tensor:
    """`grouped_nms` by Triton: on a GPU, or on a CPU in Triton's interpreter."""
    from swin_dense.heads.suppression_kernels import suppression_kernel

    keep = torch.zeros_like(groups, dtype=torch.bool)
    if len(boxes) == 0 or num_groups == 0:
        return keep
    order, starts = _by_group_and_score(scores, groups, num_groups)
    with torch.cuda.device_of(boxes):
        suppression_kernel[(num_groups,)](
            boxes=boxes.contiguous(),
            order=order,
            starts=starts,
            threshold=boxes.new_full((1,), _rounded_down(iou, boxes.dtype)),
            kept_boxes=boxes.new_empty((4, len(boxes))),
            keep=keep,
            num_rows=len(boxes),
            BLOCK=_BLOCKS[boxes.dtype],
            num_warps=_WARPS,
            num_stages=1,
            enable_fp_fusion=False,  # multiply-adds would round differently
        )
    return keep


def _by_group_and_score(scores: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Rows by group and falling score, and where in them groups begin, (num_groups + 1,); the last is where all end."""
    groups = torch.where(scores == float("-inf"), num_groups, groups)
    order = scores.argsort(descending=True, stable=True)
    groups, places = groups[order].sort(stable=True)
    return order[places], torch.searchsorted(groups, torch.arange(num_groups + 1, device=groups.device))


def _rounded_down(number: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that is not larger; what of this dtype lies above the one lies above the other."""
    nearest = torch.tensor(number, dtype=dtype)
    if nearest.item() > number:
        nearest = nearest.nextafter(nearest.new_tensor(float("-inf")))
    return nearest.item()


@kernel_trial("boxes are suppressed group by group, which is slower: the kernel for all groups")
def kernel_is_right(device: torch.device, dtype: torch.dtype) -> None:
    """Whether the kernel keeps what torchvision does on a CPU, of a few boxes.

    Args:
        device: A GPU.
        dtype: Of the boxes.
    """
    count, num_groups, iou = 3 * _BLOCKS[dtype], 2, 0.3
    numbers = torch.rand(count, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    boxes = torch.cat((numbers[:, :2], numbers[:, :2] + numbers[:, 2:4]), dim=1)
    scores, groups = numbers[:, 4], (numbers[:, 5] < 0.1).long()
    wanted = nms_group_by_group(boxes, scores, groups, num_groups, iou)
    got = nms_by_kernel(boxes.to(device), scores.to(device), groups.to(device), num_groups, iou)
    if not torch.equal(got.cpu(), wanted):
        raise WrongResult("keeps other boxes")
