"""Where families store the same parameter with other values: each change with its inverse, bit for bit.

Every function takes and returns the tensors of one rule, see `rules.Rule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The four cells of a merged patch: here and in the official code (0,0) (1,0) (0,1) (1,1) as (row, column); torch's
# unfold, which OpenMMLab's code calls, goes row by row.
_CELL_ORDER = [0, 2, 1, 3]


def merging_from_channel_major(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Patch merging that reads all cells of a channel, then the next channel, to one that reads cell by cell.

    The last axis of a reduction (2C, 4C) or a norm (4C,) is reordered.
    """
    (value,) = tensors
    channels = value.shape[-1] // 4
    cells = value.reshape(-1, channels, 4)[:, :, _CELL_ORDER]
    return [cells.transpose(1, 2).reshape(value.shape)]


def merging_to_channel_major(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `merging_from_channel_major`."""
    (value,) = tensors
    channels = value.shape[-1] // 4
    cells = value.reshape(-1, 4, channels)[:, _CELL_ORDER]
    return [cells.transpose(1, 2).reshape(value.shape)]


def stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Query, key and value (C, …) to one (3C, …)."""
    return [torch.cat(list(tensors))]


def unstack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `stack`."""
    (value,) = tensors
    return value.chunk(3)


def drop_key_bias(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A bias (3C,) to those of query and value, (C,) each: Swin V2 has none for the keys and zeroes that third."""
    query, _, value = tensors[0].chunk(3)
    return query, value


def add_key_bias(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `drop_key_bias`, with zeros for the keys."""
    query, value = tensors
    return [torch.cat((query, torch.zeros_like(query), value))]


def background_first(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Class rows with background last, (K + 1, …), to rows with background first."""
    (value,) = tensors
    return [torch.cat((value[-1:], value[:-1]))]


def background_last(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `background_first`."""
    (value,) = tensors
    return [torch.cat((value[1:], value[:1]))]


def add_background_box(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Box offsets (4K, …) to (4 (K + 1), …): torchvision keeps four rows for background, which nothing reads.

    A second tensor holds these rows where a file kept them; otherwise they are zeros.
    """
    return _add_rows(tensors, 4)


def drop_background_box(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `add_background_box`; rows that are not zero go into a tensor of their own."""
    return _drop_rows(tensors, 4)


def add_background_box_unless_shared(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As `add_background_box`, but four rows are one box for all classes and stay as they are."""
    return tensors if len(tensors) == 1 and len(tensors[0]) == 4 else add_background_box(tensors)


def drop_background_box_unless_shared(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `add_background_box_unless_shared`."""
    return tensors if len(tensors[0]) == 4 else drop_background_box(tensors)


def add_background_mask(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Mask logits (K, …) to (K + 1, …), as `add_background_box`."""
    return _add_rows(tensors, 1)


def drop_background_mask(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `add_background_mask`."""
    return _drop_rows(tensors, 1)


def _add_rows(tensors: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    value, *kept = tensors
    return [torch.cat((kept[0] if kept else value.new_zeros(rows, *value.shape[1:]), value))]


def _drop_rows(tensors: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
    (value,) = tensors
    background = value[:rows]
    return [value[rows:], background] if background.any() else [value[rows:]]


def grid_from_tokens(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A position embedding per token (1, L, C) to one on a square grid (1, C, H, W).

    Raises:
        ValueError: L is no square, so the grid cannot be told.
    """
    (value,) = tensors
    side = math.isqrt(value.shape[1])
    if value.ndim != 3 or side * side != value.shape[1]:
        raise ValueError(f"expected (1, H W, C) with H = W, got {tuple(value.shape)}")
    return [value.transpose(1, 2).reshape(1, -1, side, side)]


def tokens_from_grid(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `grid_from_tokens`."""
    return [tensors[0].flatten(2).transpose(1, 2)]
