"""Self-attention inside windows, of Swin and of Swin V2.

Swin: https://arxiv.org/abs/2103.14030, section 3.2. Swin V2: https://arxiv.org/abs/2111.09883, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from swin_dense.windows import relative_position_index

# log(100) in float32, as the official code clamps it: in float64 the next digits would make another network.
_LARGEST_LOG_SCALE = float(torch.log(torch.tensor(100.0)))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learnt bias per head and relative position (eq. 4).

    Args:
        dim: The number of channels C.
        num_heads: The number of heads; divides C.
        window_size: M, in cells.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    relative_position_index: Tensor
    scale: float | None = None  # of the logits; None is one over the root of the head's channels

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            windows: (B, n, M M, C).
            mask: (n, M M, M M), added to the attention logits of every head; None adds nothing.

        Returns:
            (B, n, M M, C).
        """
        batch, num_windows, area, channels = windows.shape
        # Windows and heads share one axis, so that bias and mask broadcast over the images of the batch.
        qkv = self.project(windows).view(batch, num_windows, area, 3, self.num_heads, channels // self.num_heads)
        parts = self.compared(*qkv.permute(3, 0, 1, 4, 2, 5).unbind(0))
        bias = self.relative_position_bias()
        if mask is None:
            query, key, value = (part.flatten(0, 1) for part in parts)
            bias = bias[None]
        else:
            query, key, value = (part.flatten(1, 2) for part in parts)
            bias = (bias + mask[:, None]).flatten(0, 1)[None]
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias.to(query.dtype), scale=self.scale
        )
        attended = attended.view(batch, num_windows, self.num_heads, area, channels // self.num_heads)
        return self.proj(attended.transpose(2, 3).flatten(3))

    def project(self, windows: Tensor) -> Tensor:
        """Queries, keys and values in turn: (..., C) to (..., 3 C)."""
        return self.qkv(windows)

    def compared(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the logits are the products of; each (B, n, num_heads, M M, C / num_heads)."""
        return query, key, value

    def relative_position_bias(self) -> Tensor:
        """The bias of every pair of cells, (num_heads, M M, M M)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class CosineWindowAttention(WindowAttention):
    """The attention of Swin V2: cosines of queries and keys, and a position bias from a small network (section 3).

    Offsets are measured on a logarithmic scale against the window the weights were trained with, so that the network
    extends to larger windows.

    Args:
        dim: The number of channels C.
        num_heads: The number of heads; divides C.
        window_size: M, in cells.
        qkv_bias: Whether queries and values have a bias; keys have none.
        pretrained_window_size: The window that offsets are measured against.
    """

    relative_coords_table: Tensor
    scale = 1.0

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool, pretrained_window_size: int) -> None:
        super().__init__(dim, num_heads, window_size, qkv_bias=False)
        del self.relative_position_bias_table
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        table = log_offsets(window_size, pretrained_window_size)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def project(self, windows: Tensor) -> Tensor:
        """Queries, keys and values in turn: (..., C) to (..., 3 C)."""
        if self.q_bias is None or self.v_bias is None:
            return self.qkv(windows)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return functional.linear(windows, self.qkv.weight, bias)

    def compared(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of unit length, the queries times each head's learnt scale, at most 100."""
        scale = self.logit_scale.clamp(max=_LARGEST_LOG_SCALE).exp()
        return functional.normalize(query, dim=-1) * scale, functional.normalize(key, dim=-1), value

    def relative_position_bias(self) -> Tensor:
        """The bias of every pair of cells, (num_heads, M M, M M), each in (0, 16)."""
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table))
        return table[self.relative_position_index].permute(2, 0, 1)


def log_offsets(window_size: int, pretrained_window_size: int) -> Tensor:
    """The offsets between cells of a window as the position network sees them (equation 4).

    Args:
        window_size: M.
        pretrained_window_size: The window whose largest offset counts as 8.

    Returns:
        ((2M - 1)^2, 2) float (dy, dx): sign(d) log2(1 + |d|) / 3 with d the offset times 8 over the largest one.
    """
    # In float32 and in this order, as every published implementation computes it.
    offset = torch.arange(1 - window_size, window_size, dtype=torch.float32)
    offset = offset / max(pretrained_window_size - 1, 1) * 8
    offset = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
    return torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1).view(-1, 2)
