"""Parameters fitted to a model of other sizes. Each function is pure; what cannot be fitted is None."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

# Parameters with rows for classes: (name, rows per class, whether background comes first).
_CLASS_ROWS = (
    (re.compile(r"roi_heads\.box_predictor\.(\d+\.)?cls_score\..*"), 1, True),
    (re.compile(r"roi_heads\.box_predictor\.(\d+\.)?bbox_pred\..*"), 4, True),
    (re.compile(r"roi_heads\.mask_predictor\.(\d+\.)?mask_fcn_logits\..*"), 1, True),
    (re.compile(r"(decode_head|auxiliary_head)\.conv_seg\..*"), 1, False),
    (re.compile(r"head\..*"), 1, False),
)


def resized_bias_table(table: Tensor, rows: int) -> Tensor:
    """A relative position bias table for another window.

    Bicubic, corners not aligned, as the official code does it (`load_pretrained` of its utils.py).

    Args:
        table: ((2M - 1)^2, heads).
        rows: (2M' - 1)^2.

    Returns:
        (rows, heads).
    """
    side, new_side = math.isqrt(len(table)), math.isqrt(rows)
    grid = table.t().reshape(1, -1, side, side)
    return functional.interpolate(grid, size=(new_side, new_side), mode="bicubic").reshape(-1, rows).t()


def resized_position_embedding(embedding: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """An absolute position embedding (1, C, H, W) for another grid; bicubic, corners not aligned, as published."""
    return functional.interpolate(embedding, size=size_hw, mode="bicubic")


def with_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """The patch convolution (C, c, P, P) for another number of image channels.

    One channel gets the sum, so that a grey picture gives what it gave as three equal channels; more repeat the old
    ones in turn, scaled by old over new. timm does the same.
    """
    old = weight.shape[1]
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [channel % old for channel in range(in_channels)]] * (old / in_channels)


def class_layout(name: str) -> tuple[int, bool] | None:
    """Rows per class, and whether background's come first, of a parameter with rows for classes; None for others."""
    return next(((rows, first) for names, rows, first in _CLASS_ROWS if names.fullmatch(name)), None)


def num_classes(name: str, rows: int) -> int:
    """K, background not counted, of a parameter with rows for classes."""
    layout = class_layout(name)
    assert layout is not None
    per_class, background_first = layout
    return rows // per_class - background_first


def with_classes(
    name: str, value: Tensor, fresh: Tensor, file_classes: Sequence[str], model_classes: Sequence[str]
) -> Tensor:
    """Rows of the classes of the same name from a file, those of other classes as they are in the model.

    Args:
        name: Of the parameter.
        value: From the file; rows for `file_classes`.
        fresh: Of the model; rows for `model_classes`. Not changed.
        file_classes: Names, background not among them.
        model_classes: Likewise.
    """
    layout = class_layout(name)
    assert layout is not None
    per_class, background_first = layout
    adapted = fresh.clone()
    new_rows = adapted.view(-1, per_class, *fresh.shape[1:])
    old_rows = value.to(fresh).view(-1, per_class, *fresh.shape[1:])
    if background_first:
        new_rows[0] = old_rows[0]
    for index, name_of_class in enumerate(model_classes):
        if name_of_class in file_classes:
            new_rows[index + background_first] = old_rows[file_classes.index(name_of_class) + background_first]
    return adapted
