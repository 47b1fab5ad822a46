"""Self-attention inside windows, of Swin and of Swin V2.

Swin: https://arxiv.org/abs/2103.14030, section 3.2. Swin V2: https://arxiv.org/abs/2111.09883, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from swin_dense.linear import apply_linear, linear
from swin_dense.window_attention import chosen_implementation, window_attention
from swin_dense.windows import ShiftedWindows, pad_to_multiple, relative_position_index

# log(100) in float32, as the official code clamps it: in float64 the next digits would make another network.
_LARGEST_LOG_SCALE = float(torch.log(torch.tensor(100.0, device="cpu")))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a learnt bias per head and relative position (eq. 4).

    Args:
        dim: The number of channels C.
        num_heads: The number of heads; divides C.
        window_size: M, in cells.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)

    def forward(self, x: Tensor, windows: ShiftedWindows) -> Tensor:
        """Attend within each window of a map; (B, h, w, C) to the same shape.

        Args:
            x: (B, h, w, C), any h and w.
            windows: How it is cut; of the window size that the attention was built for.
        """
        height, width = x.shape[1:3]
        if windows.pad_first and chosen_implementation(x) == "reference":
            x = pad_to_multiple(x, windows.window_size)  # as published; the others know what the zeros are projected to
        qkv, bias = self.project(x), self.qkv_bias()
        padding = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias.to(qkv.dtype)
        attended = window_attention(qkv, padding, self.relative_position_bias(), self.logit_scales(), windows)
        return apply_linear(self.proj, attended)[:, :height, :width]

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values in turn: (..., C) to (..., 3 C)."""
        return apply_linear(self.qkv, x)

    def qkv_bias(self) -> Tensor | None:
        """What the projection adds to them, (3 C,)."""
        return self.qkv.bias

    def logit_scales(self) -> Tensor | None:
        """(num_heads,), what logits are cosines times; None for products over the root of the head's channels."""
        return None

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

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool, pretrained_window_size: int) -> None:
        super().__init__(dim, num_heads, window_size, qkv_bias=False)
        del self.relative_position_bias_table
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        table = log_offsets(window_size, pretrained_window_size)
        self.register_buffer("relative_coords_table", table, persistent=False)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values in turn: (..., C) to (..., 3 C)."""
        return linear(x, self.qkv.weight, self.qkv_bias())

    def qkv_bias(self) -> Tensor | None:
        """What the projection adds to them, (3 C,); nothing to keys."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def logit_scales(self) -> Tensor:
        """(num_heads,), each head's learnt scale, at most 100."""
        return self.logit_scale.clamp(max=_LARGEST_LOG_SCALE).exp().flatten()

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
