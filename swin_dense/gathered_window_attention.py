"""Window attention for CPUs: cells are gathered by index into windows and back, some windows at a time.

The reference moves the whole map five times (pad, roll, cut, join, roll back) and holds the logits of all windows at
once. Here each head's row of a cell is copied once on the way in and once on the way out, and logits are made, used and
overwritten while they are in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_dense.window_attention import cosine_factors
from swin_dense.windows import (
    ShiftedWindows,
    SizeHW,
    missing_to_multiple,
    shift_and_pad,
    shift_mask,
    window_partition,
)

_LOGITS_AT_ONCE = 2**19  # 2 MB in float32, the second-level cache of two cores


def gathered_window_attention(
    qkv: Tensor, padding: Tensor, bias: Tensor, logit_scale: Tensor | None, windows: ShiftedWindows
) -> Tensor:
    """As `window_attention.window_attention`, on a CPU; differentiable once."""
    scale = (qkv.shape[-1] // (3 * bias.shape[0])) ** -0.5
    if logit_scale is not None:
        scale = 1.0
        qkv, padding = _with_cosines(qkv, logit_scale), _with_cosines(padding, logit_scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, padding, bias)):
        return _GatheredWindowAttention.apply(qkv, padding, bias, scale, windows)
    with torch.autocast(qkv.device.type, enabled=False):
        return _attend(qkv, padding, bias, scale, windows)


def _with_cosines(qkv: Tensor, logit_scale: Tensor) -> Tensor:
    query, key, value = qkv.unflatten(-1, (3, len(logit_scale), -1)).unbind(-3)
    query, key = cosine_factors(query, key, logit_scale[:, None])
    return torch.stack([part.to(qkv.dtype) for part in (query, key, value)], dim=-3).flatten(-3)


class _GatheredWindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        qkv: Tensor,
        padding: Tensor,
        bias: Tensor,
        scale: float,
        windows: ShiftedWindows,
    ) -> Tensor:
        batch, height, width, _ = qkv.shape
        num_heads, area = bias.shape[:2]
        num_windows = cells_of_windows((height, width), windows, 3, num_heads).to_windows.shape[1]
        parts = qkv.new_empty(batch, 3, num_windows, num_heads, area, qkv.shape[3] // (3 * num_heads))
        probabilities = qkv.new_empty(batch, num_windows, num_heads, area, area)
        ctx.save_for_backward(parts, probabilities)
        ctx.scale, ctx.windows, ctx.size_hw, ctx.bias_dtype = scale, windows, (height, width), bias.dtype
        with torch.autocast(qkv.device.type, enabled=False):
            return _attend(qkv, padding, bias, scale, windows, parts, probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: ANN401
        parts, probabilities = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            gradients = _attend_backward(gradient, parts, probabilities, ctx.scale, ctx.windows, ctx.size_hw)
        qkv_gradient, padding_gradient, bias_gradient = gradients
        return qkv_gradient, padding_gradient, bias_gradient.to(ctx.bias_dtype), None, None


def _attend(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    scale: float,
    windows: ShiftedWindows,
    parts: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> Tensor:
    """The attended map (B, H, W, C).

    Where given, `parts` (B, 3, n, num_heads, M M, d) and `probabilities` (B, n, num_heads, M M, M M) are filled.
    """
    batch, height, width, channels = qkv.shape
    num_heads, area = bias.shape[:2]
    width_of_head = channels // (3 * num_heads)
    accurate = torch.promote_types(qkv.dtype, torch.float32)
    bias, mask = bias.to(accurate), _mask(qkv, windows, accurate)
    inward = cells_of_windows((height, width), windows, 3, num_heads)
    outward = cells_of_windows((height, width), windows, 1, num_heads)
    num_windows = inward.to_windows.shape[1]
    out = qkv.new_empty(batch, height, width, channels // 3)
    attended = qkv.new_empty(num_windows, num_heads, area, width_of_head)
    padding = padding.to(qkv.dtype)
    for image in range(batch):
        rows = qkv[image].reshape(-1, width_of_head)
        for some in _runs(num_windows, num_heads * area**2):
            query, key, value = _gathered(rows, padding, inward, some, None if parts is None else parts[image, :, some])
            logits = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, (-1, num_heads))
            logits = logits.to(accurate)  # first: sums of two dtypes take twenty times as long
            torch.add(bias, logits, alpha=scale, out=logits)
            if mask is not None:
                logits += mask[some, None]
            weights = logits.softmax(dim=-1).to(qkv.dtype)
            if probabilities is not None:
                probabilities[image, some] = weights
            torch.bmm(weights.flatten(0, 1), value.flatten(0, 1), out=attended[some].flatten(0, 1))
        torch.index_select(
            attended.view(-1, width_of_head), 0, outward.to_map.flatten(), out=out[image].view(-1, width_of_head)
        )
    return out


def _attend_backward(
    gradient: Tensor, parts: Tensor, probabilities: Tensor, scale: float, windows: ShiftedWindows, size_hw: SizeHW
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the map (B, H, W, 3 C), of a padded cell (3 C,) and of the bias (num_heads, M M, M M)."""
    batch, _, num_windows, num_heads, area, width_of_head = parts.shape
    inward = cells_of_windows(size_hw, windows, 3, num_heads)
    outward = cells_of_windows(size_hw, windows, 1, num_heads)
    accurate = torch.promote_types(parts.dtype, torch.float32)
    qkv_gradient = gradient.new_empty(batch, *size_hw, 3 * num_heads * width_of_head)
    padding_gradient = gradient.new_zeros(3, num_heads, width_of_head, dtype=accurate)
    bias_gradient = gradient.new_zeros(num_heads, area, area, dtype=accurate)
    in_windows = gradient.new_empty(3, num_windows, num_heads, area, width_of_head)
    nothing = gradient.new_zeros(num_heads * width_of_head)
    for image in range(batch):
        rows = gradient[image].reshape(-1, width_of_head)
        for some in _runs(num_windows, num_heads * area**2):
            query, key, value = (part.flatten(0, 1) for part in parts[image, :, some])
            weights = probabilities[image, some].flatten(0, 1)
            (out_gradient,) = (part.flatten(0, 1) for part in _gathered(rows, nothing, outward, some))
            query_gradient, key_gradient, value_gradient = (part.flatten(0, 1) for part in in_windows[:, some])
            torch.bmm(weights.transpose(1, 2), out_gradient, out=value_gradient)
            weights_gradient = torch.bmm(out_gradient, value.transpose(1, 2))
            logits_gradient = torch._softmax_backward_data(
                weights_gradient.to(accurate), weights.to(accurate), -1, accurate
            )
            bias_gradient += logits_gradient.unflatten(0, (-1, num_heads)).sum(dim=0)
            logits_gradient = (logits_gradient * scale).to(parts.dtype)
            torch.bmm(logits_gradient, key, out=query_gradient)
            torch.bmm(logits_gradient.transpose(1, 2), query, out=key_gradient)
        torch.index_select(
            in_windows.view(-1, width_of_head),
            0,
            inward.to_map.flatten(),
            out=qkv_gradient[image].view(-1, width_of_head),
        )
        padding_gradient += in_windows[:, inward.padded_windows, :, inward.padded_positions].sum(dim=0, dtype=accurate)
    return qkv_gradient, padding_gradient.flatten().to(gradient.dtype), bias_gradient


class Cells(NamedTuple):
    """Where the rows of heads lie in a map, and where in its windows. A row is what one head holds of one cell.

    Attributes:
        to_windows: (P, n, num_heads, M M) rows of a map (H W, P, num_heads); any row for a padded cell.
        to_map: (H W, P, num_heads) rows of the windows (P, n, num_heads, M M).
        padded_windows: (N,) the window of each padded cell, in order.
        padded_positions: (N,) where in its window it lies.
        padded_before: How many padded cells lie before each of the n windows, and N.
    """

    to_windows: Tensor
    to_map: Tensor
    padded_windows: Tensor
    padded_positions: Tensor
    padded_before: list[int]


@lru_cache(maxsize=64)  # both kinds of blocks, inwards and outwards, in all stages of a few image sizes
def cells_of_windows(size_hw: SizeHW, windows: ShiftedWindows, num_parts: int, num_heads: int) -> Cells:
    """The rows of each window's cells.

    Args:
        size_hw: (H, W) of the map.
        windows: How it is cut.
        num_parts: P: 3 for queries, keys and values, 1 for what is attended.
        num_heads: Of each part.
    """
    with torch.inference_mode(False):  # indices first made for inference must serve training too
        num_cells = size_hw[0] * size_hw[1]
        cells = torch.arange(num_cells).view(1, *size_hw, 1)
        cells = window_partition(shift_and_pad(cells, torch.tensor([num_cells]), windows), windows.window_size)
        cells = cells[0, :, :, 0]
        inside = cells < num_cells
        part, head = torch.arange(num_parts)[:, None], torch.arange(num_heads)
        in_map = torch.where(inside, cells, 0)[:, None, :] * num_parts + part[:, None, None]
        to_windows = in_map * num_heads + head[:, None]
        window_of, position_of = torch.empty(2, num_cells, 1, 1, dtype=torch.long)
        window_of[cells[inside]], position_of[cells[inside]] = (
            index[:, None, None] for index in inside.nonzero().unbind(1)
        )
        to_map = ((part * len(cells) + window_of) * num_heads + head) * cells.shape[1] + position_of
        padded_windows, padded_positions = (~inside).nonzero().unbind(1)
        padded_before = torch.cat((torch.zeros(1, dtype=torch.long), (~inside).sum(dim=1).cumsum(0))).tolist()
        return Cells(to_windows, to_map, padded_windows, padded_positions, padded_before)


def _gathered(rows: Tensor, padding: Tensor, cells: Cells, some: slice, out: Tensor | None = None) -> Tensor:
    """Rows of a map as the windows `some` see them, (P, windows, num_heads, M M, d)."""
    indices = cells.to_windows[:, some]
    if out is None:
        out = rows.new_empty(*indices.shape, rows.shape[1])
    for part, index in zip(out, indices, strict=True):
        torch.index_select(rows, 0, index.flatten(), out=part.view(-1, rows.shape[1]))
    padded = slice(cells.padded_before[some.start], cells.padded_before[some.stop])
    if padded.start < padded.stop:
        held = padding.view(out.shape[0], out.shape[2], out.shape[4])
        out[:, cells.padded_windows[padded] - some.start, :, cells.padded_positions[padded]] = held
    return out


def _runs(num_windows: int, logits_per_window: int) -> Iterator[slice]:
    step = max(1, _LOGITS_AT_ONCE // logits_per_window)
    for start in range(0, num_windows, step):
        yield slice(start, min(start + step, num_windows))


def _mask(qkv: Tensor, windows: ShiftedWindows, dtype: torch.dtype) -> Tensor | None:
    if windows.shift_hw == (0, 0):
        return None
    (height, width), multiple = qkv.shape[1:3], windows.window_size
    padded_hw = height + missing_to_multiple(height, multiple), width + missing_to_multiple(width, multiple)
    return shift_mask(padded_hw, multiple, windows.shift_hw, windows.mask_value, dtype, qkv.device)
