"""Window attention for CPUs: cells are gathered by index into windows and back, some windows at a time.

The reference moves the whole map five times (pad, roll, cut, join, roll back) and holds the logits of all windows at
once. Here each head's row of a cell is copied once on the way in and once on the way out, and logits are made, used and
overwritten while they are in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin_dense.gathered_windows import cells_of_windows, gathered
from swin_dense.window_attention import cosine_factors
from swin_dense.windows import ShiftedWindows, missing_to_multiple, shift_mask, windows_of_a_map

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
    attend = _attend_operator if torch.compiler.is_compiling() else _attend
    return attend(qkv, padding, bias, scale, *windows)


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
        ctx.scale, ctx.windows, ctx.bias_dtype = scale, windows, bias.dtype
        attend = _attend_and_keep_operator if torch.compiler.is_compiling() else _attend_and_keep
        out, parts, probabilities = attend(qkv, padding, bias, scale, *windows)
        ctx.save_for_backward(parts, probabilities)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: ANN401
        attend_backward = _attend_backward_operator if torch.compiler.is_compiling() else _attend_backward
        parts, probabilities = ctx.saved_tensors
        gradients = attend_backward(gradient, parts, probabilities, ctx.scale, *ctx.windows)
        return gradients[0], gradients[1], gradients[2].to(ctx.bias_dtype), None, None


def _attend(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    scale: float,
    window_size: int,
    shift_hw: Sequence[int],
    pad_first: bool,
    mask_value: float,
) -> Tensor:
    """The attended map (B, H, W, C)."""
    windows = _as_windows(window_size, shift_hw, pad_first, mask_value)
    with torch.autocast(qkv.device.type, enabled=False):
        return _attended(qkv, padding, bias, scale, windows)


def _attend_and_keep(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    scale: float,
    window_size: int,
    shift_hw: Sequence[int],
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with what its gradient needs, `_kept`."""
    windows = _as_windows(window_size, shift_hw, pad_first, mask_value)
    parts, probabilities = _kept(qkv, bias, window_size)
    with torch.autocast(qkv.device.type, enabled=False):
        return _attended(qkv, padding, bias, scale, windows, parts, probabilities), parts, probabilities


def _attend_backward(
    gradient: Tensor,
    parts: Tensor,
    probabilities: Tensor,
    scale: float,
    window_size: int,
    shift_hw: Sequence[int],
    pad_first: bool,
    mask_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the map (B, H, W, 3 C), of a padded cell (3 C,) and of the bias (num_heads, M M, M M)."""
    windows = _as_windows(window_size, shift_hw, pad_first, mask_value)
    with torch.autocast(gradient.device.type, enabled=False):
        return _gradients(gradient, parts, probabilities, scale, windows)


def _as_windows(window_size: int, shift_hw: Sequence[int], pad_first: bool, mask_value: float) -> ShiftedWindows:
    return ShiftedWindows(window_size, (shift_hw[0], shift_hw[1]), pad_first, mask_value)


def _kept(qkv: Tensor, bias: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values (B, 3, n, num_heads, M M, d), and probabilities (B, n, num_heads, M M, M M), empty."""
    batch, height, width, channels = qkv.shape
    num_heads, area = bias.shape[:2]
    num_windows = windows_of_a_map((height, width), window_size)
    return (
        qkv.new_empty(batch, 3, num_windows, num_heads, area, channels // (3 * num_heads)),
        qkv.new_empty(batch, num_windows, num_heads, area, area),
    )


# A compiler would look into the loops over windows and unroll them, so it gets operators.
_attend_operator = torch.library.custom_op("swin_dense::gathered_window_attention", _attend, mutates_args=())
_attend_and_keep_operator = torch.library.custom_op(
    "swin_dense::gathered_window_attention_and_kept", _attend_and_keep, mutates_args=()
)
_attend_backward_operator = torch.library.custom_op(
    "swin_dense::gathered_window_attention_backward", _attend_backward, mutates_args=()
)


@_attend_operator.register_fake
def _(qkv: Tensor, padding: Tensor, bias: Tensor, *numbers: object) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@_attend_and_keep_operator.register_fake
def _(
    qkv: Tensor, padding: Tensor, bias: Tensor, scale: float, window_size: int, *numbers: object
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), *_kept(qkv, bias, window_size)


@_attend_backward_operator.register_fake
def _(gradient: Tensor, parts: Tensor, probabilities: Tensor, *numbers: object) -> tuple[Tensor, Tensor, Tensor]:
    channels = 3 * gradient.shape[3]
    bias_gradient = gradient.new_empty(probabilities.shape[2:], dtype=torch.promote_types(parts.dtype, torch.float32))
    return gradient.new_empty(*gradient.shape[:3], channels), gradient.new_empty(channels), bias_gradient


def _attended(
    qkv: Tensor,
    padding: Tensor,
    bias: Tensor,
    scale: float,
    windows: ShiftedWindows,
    parts: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> Tensor:
    """As `_attend`; what is kept is filled where it is given."""
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
            query, key, value = gathered(rows, padding, inward, some, None if parts is None else parts[image, :, some])
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


def _gradients(
    gradient: Tensor, parts: Tensor, probabilities: Tensor, scale: float, windows: ShiftedWindows
) -> tuple[Tensor, Tensor, Tensor]:
    size_hw = (gradient.shape[1], gradient.shape[2])
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
            (out_gradient,) = (part.flatten(0, 1) for part in gathered(rows, nothing, outward, some))
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
