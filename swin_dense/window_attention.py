"""Attention within the shifted windows of a map, as one function of its queries, keys and values.

`reference_window_attention` is its readable definition. The other implementations compute the same without moving the
map about: "gathered" for CPUs, "fused" for GPUs. Symbols as in `windows.py`; queries, keys and values have num_heads
heads of d channels each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from swin_dense.errors import ConfigError
from swin_dense.watched import operations_are_watched
from swin_dense.windows import (
    ShiftedWindows,
    shift_and_pad,
    shift_mask,
    unshift_and_crop,
    window_merge,
    window_partition,
)

Implementation = Literal["auto", "reference", "gathered", "fused"]

_implementation: ContextVar[Implementation] = ContextVar("implementation", default="auto")


@contextmanager
def attention_implementation(name: Implementation) -> Iterator[None]:
    """Within this context, every window attention is computed this way.

    Args:
        name: "reference", "gathered" (on CPUs), "fused" (on GPUs, by Triton), or "auto": the fastest
            that the tensors allow.

    Raises:
        ConfigError: There is no such implementation.

    Example:
        >>> with attention_implementation("reference"):
        ...     pass
    """
    if name not in get_args(Implementation):
        raise ConfigError(
            f"attention_implementation must be one of {', '.join(get_args(Implementation))}, got {name!r}."
        )
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def window_attention(
    qkv: Tensor, padding: Tensor, bias: Tensor, logit_scale: Tensor | None, windows: ShiftedWindows
) -> Tensor:
    """Multi-head attention of each cell to the cells of its window.

    Cells that the map is padded with take part like any other.

    Args:
        qkv: (B, H, W, 3 C), the queries, keys and values of the map's cells in turn, each head by head.
        padding: (3 C,), those of a padded cell.
        bias: (num_heads, M M, M M), added to the logits.
        logit_scale: None: logits are q k / sqrt(d). (num_heads,): logits are the cosines of q and k times this.
        windows: How the map is cut.

    Returns:
        (B, H, W, C).
    """
    if not len(qkv):
        # All dropped by stochastic depth. Attention's operators differ in whether nothing gives zeros for gradients.
        parameters = sum(x.sum() for x in (padding, bias, logit_scale) if x is not None)
        return qkv[..., : qkv.shape[-1] // 3] + 0 * parameters
    name = chosen_implementation(qkv)
    if name == "gathered":
        from swin_dense.gathered_window_attention import gathered_window_attention

        return gathered_window_attention(qkv, padding, bias, logit_scale, windows)
    if name == "fused":
        from swin_dense.attention_trial import fused_is_right
        from swin_dense.fused_window_attention import fused_window_attention

        head_dim = qkv.shape[-1] // (3 * bias.shape[0])
        kind = qkv.device, qkv.dtype, windows.window_size, head_dim, logit_scale is not None
        if _implementation.get() == "fused" or fused_is_right(*kind):
            return fused_window_attention(qkv, padding, bias, logit_scale, *windows)
    return reference_window_attention(qkv, padding, bias, logit_scale, windows)


def chosen_implementation(x: Tensor) -> Implementation:
    """What computes the attention of a map, by its device and dtype: all but "auto"."""
    name = _implementation.get()
    if name != "auto":
        return name
    if x.is_cuda and x.dtype != torch.float64 and not operations_are_watched():
        return "fused"
    if x.device.type == "cpu" and not operations_are_watched():
        return "gathered"
    return "reference"


def reference_window_attention(
    qkv: Tensor, padding: Tensor, bias: Tensor, logit_scale: Tensor | None, windows: ShiftedWindows
) -> Tensor:
    """`window_attention` as the paper describes it: pad, roll, cut, attend, join, roll back, crop."""
    num_heads, size_hw = bias.shape[0], (qkv.shape[1], qkv.shape[2])
    x = shift_and_pad(qkv, padding, windows)
    padded_hw = (x.shape[1], x.shape[2])
    x = window_partition(x, windows.window_size)
    batch, num_windows, area, channels = x.shape
    width_of_head = channels // (3 * num_heads)
    x = x.view(batch, num_windows, area, 3, num_heads, width_of_head)
    query, key, value = x.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each (B, n, num_heads, M M, d)
    scale = None
    if logit_scale is not None:
        query, key = cosine_factors(query, key, logit_scale[:, None, None])
        scale = 1.0
    # Windows and heads share one axis, so that bias and mask broadcast over the images of the batch.
    if windows.shift_hw == (0, 0):
        query, key, value = (part.flatten(0, 1) for part in (query, key, value))
        bias = bias[None]
    else:
        query, key, value = (part.flatten(1, 2) for part in (query, key, value))
        mask = shift_mask(padded_hw, *windows[:2], windows.mask_value, bias.dtype, bias.device)
        bias = (bias + mask[:, None]).flatten(0, 1)[None]
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
    attended = attended.view(batch, num_windows, num_heads, area, width_of_head).transpose(2, 3).flatten(3)
    return unshift_and_crop(window_merge(attended, windows.window_size, padded_hw), size_hw, windows)


def cosine_factors(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the logits of Swin V2 are products of: queries and keys of unit length, the queries times each head's scale.

    Args:
        query: (..., d).
        key: (..., d).
        scale: Broadcasts to the queries.
    """
    return functional.normalize(query, dim=-1) * scale, functional.normalize(key, dim=-1)
