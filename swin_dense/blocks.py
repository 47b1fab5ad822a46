"""What the stages of Swin and Swin V2 are made of: blocks and patch merging, on maps of any size.

Swin: https://arxiv.org/abs/2103.14030. Swin V2: https://arxiv.org/abs/2111.09883. A map is (B, h, w, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from swin_dense.attention import WindowAttention
from swin_dense.config import WindowRule
from swin_dense.linear import apply_linear, is_plain
from swin_dense.watched import operations_are_watched
from swin_dense.windows import ShiftedWindows, SizeHW, pad_to_multiple

_HIDDEN_AT_ONCE = 2**21  # 8 MB in float32: what lies between the layers of an MLP stays in a CPU's cache


class MLP(nn.Module):
    """Two linear layers with a GELU between, on the last axis.

    Args:
        dim: The number of input and output channels.
        hidden_dim: The number of channels between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._transform(x)
        if not (is_plain(self.fc1) and is_plain(self.fc2)):  # hooks see whole maps
            return self._transform(x)
        cells = x.reshape(-1, x.shape[-1])
        runs = max(1, math.ceil(len(cells) * self.fc1.out_features / _HIDDEN_AT_ONCE))
        return torch.cat([self._transform(some) for some in cells.tensor_split(runs)]).view(x.shape)

    def _transform(self, x: Tensor) -> Tensor:
        return apply_linear(self.fc2, apply_linear(self.fc1, x, gelu=True))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for whole samples (Huang et al., 2016, arXiv:1603.09382).

    What is dropped is not computed, so that it takes no time either.

    Args:
        rate: The probability of dropping; kept samples are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Samples (B, ...) plus what the branch, which keeps them apart, makes of those that are kept."""
        if self.rate == 0 or not self.training:
            return x + branch(x)
        if torch.compiler.is_compiling() or operations_are_watched():  # the same operations whatever is dropped
            kept = torch.rand((len(x), *[1] * (x.ndim - 1)), device=x.device) >= self.rate
            return x + branch(x) * (kept.to(x.dtype) / (1 - self.rate))
        kept = torch.rand(len(x), device="cpu") >= self.rate  # the host knows how many without waiting for a GPU
        rows = kept.nonzero().squeeze(1).to(x.device, non_blocking=True)
        change = branch(x.index_select(0, rows)) / (1 - self.rate)  # of no samples: parameters still get gradients
        dtype = torch.promote_types(x.dtype, change.dtype)
        return x.to(dtype).index_add(0, rows, change.to(dtype))

    def extra_repr(self) -> str:
        """The rate, for the printed module."""
        return f"rate={self.rate:.3f}"


class SwinBlock(nn.Module):
    """One Swin block: (shifted) window attention, then an MLP, both residual (eq. 3).

    Args:
        dim: The number of channels C.
        attention: The attention inside windows.
        window_size: M, in cells.
        shift_size: By how many cells the windows are shifted, 0 for none.
        mlp_ratio: Hidden channels of the MLP over C.
        drop_path_rate: Stochastic depth of both branches.
        window_rule: See `SwinConfig.window_rule`.
        shift_mask_value: See `SwinConfig.shift_mask_value`.
    """

    def __init__(
        self,
        dim: int,
        attention: WindowAttention,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        drop_path_rate: float,
        window_rule: WindowRule,
        shift_mask_value: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.window_rule = window_rule
        self.shift_mask_value = shift_mask_value
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to the same shape, any h and w."""
        x = self.drop_path(x, lambda x: self.attend(self.norm1(x)))
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Attention within the shifted windows of a map; (B, h, w, C) to the same shape."""
        shift_hw = self._shift_of((x.shape[1], x.shape[2]))
        pad_first = self.window_rule != "timm"
        return self.attn(x, ShiftedWindows(self.window_size, shift_hw, pad_first, self.shift_mask_value))

    def _shift_of(self, size_hw: SizeHW) -> SizeHW:
        if self.window_rule == "dense" or self.shift_size == 0:
            return (self.shift_size, self.shift_size)
        fits_h, fits_w = size_hw[0] <= self.window_size, size_hw[1] <= self.window_size
        return (0 if fits_h else self.shift_size, 0 if fits_w else self.shift_size)


class SwinBlockV2(SwinBlock):
    """One Swin V2 block: each branch is normalised after it, not before (section 3.2). Arguments as for `SwinBlock`.

    The norms start at 0, so that a new block is the identity, as in the official code.
    """

    def reset_parameters(self) -> None:
        """Start both norms at 0."""
        for norm in (self.norm1, self.norm2):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to the same shape, any h and w."""
        x = self.drop_path(x, lambda x: self.norm1(self.attend(x)))
        return self.drop_path(x, lambda x: self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Join 2 x 2 cells into one with twice the channels (section 3.1).

    Args:
        dim: The number of input channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, ceil(h / 2), ceil(w / 2), 2C); an odd side is padded with zeros."""
        return self.reduction(self.norm(self.join(x)))

    @staticmethod
    def join(x: Tensor) -> Tensor:
        """Four cells side by side in the channels: (B, h, w, C) to (B, ceil(h / 2), ceil(w / 2), 4C)."""
        x = pad_to_multiple(x, 2)
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels)
        # The published order: down the first column, then down the second.
        return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)


class PatchMergingV2(PatchMerging):
    """As `PatchMerging`, but normalised after the reduction.

    Args:
        dim: The number of input channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to (B, ceil(h / 2), ceil(w / 2), 2C); an odd side is padded with zeros."""
        return self.norm(self.reduction(self.join(x)))
