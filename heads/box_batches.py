"""Boxes of several images in one tensor, whatever the number in each, and numbers brought to them without waiting.

How many boxes an image has is often known on a GPU only. To ask is to wait until the GPU has caught up, after which it
waits in turn; so images with fewer boxes have empty places instead, and these are boxes that end before they begin.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

EMPTY_BOX = (0.0, 0.0, -1.0, -1.0)


def stack_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Per image (N_i, 4) xyxy to (B, N, 4), where N is the largest of N_i; empty places come last."""
    stacked = pad_sequence(list(boxes), batch_first=True)
    if all(len(image_boxes) == stacked.shape[1] for image_boxes in boxes):
        return stacked
    lengths = beside([len(image_boxes) for image_boxes in boxes], stacked, torch.int64)
    is_beyond = torch.arange(stacked.shape[1], device=stacked.device) >= lengths[:, None]
    return emptied(stacked, is_beyond)


def emptied(boxes: Tensor, is_empty: Tensor) -> Tensor:
    """The boxes (…, 4) with empty places where `is_empty` (…)."""
    return torch.where(is_empty[..., None], beside(EMPTY_BOX, boxes), boxes)


def is_box(boxes: Tensor) -> Tensor:
    """(…, 4) xyxy to (…,) bool: no empty place. A box without extent is one, too."""
    return (boxes[..., 2:] >= boxes[..., :2]).all(dim=-1)


def clip_boxes(boxes: Tensor, sizes_hw: Tensor) -> Tensor:
    """Boxes within their images: (…, 4) xyxy and (…, 2) to (…, 4)."""
    limits = sizes_hw.flip(-1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), torch.cat((limits, limits), dim=-1))


def beside(
    values: Sequence[float] | Sequence[Sequence[float]], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers known to the host as a tensor where `like` is; `torch.tensor(values, device=…)` would wait for a GPU.

    Args:
        values: The numbers.
        like: Gives the device.
        dtype: That of `like` by default.
    """
    return torch.tensor(values, dtype=dtype or like.dtype).to(like.device, non_blocking=True)


def counts_are_known(values: Tensor) -> bool:
    """Whether the host may ask for numbers in a tensor without waiting for the device."""
    return values.device.type == "cpu"
