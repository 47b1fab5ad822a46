"""Swin Transformer V1 as a multi-scale backbone: images of any size in, four normalised maps out.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., 2021), https://arxiv.org/abs/2103.14030.
Parameter names are those of the official detection and segmentation code, so that its checkpoints need no renaming.

Symbols: images (B, in_channels, H, W); a map (B, h, w, C), channels last inside the backbone; window side M.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swin_dense.config import STAGE_NAMES, SwinConfig, WindowRule, variant_config
from swin_dense.features import FeatureSpec
from swin_dense.windows import (
    SizeHW,
    missing_to_multiple,
    pad_to_multiple,
    relative_position_index,
    shift_mask,
    window_merge,
    window_partition,
)


class PatchEmbed(nn.Module):
    """Cut images into P x P patches and embed each one (section 3.1).

    Args:
        patch_size: P, in pixels.
        in_channels: The number of image channels.
        embed_dim: The number of output channels C.
        norm: Whether a LayerNorm follows.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to a map (B, ceil(H / P), ceil(W / P), C); missing pixels count as 0."""
        pad_bottom, pad_right = (missing_to_multiple(size, self.patch_size) for size in images.shape[2:])
        images = functional.pad(images, (0, pad_right, 0, pad_bottom))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


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
        qkv = self.qkv(windows).view(batch, num_windows, area, 3, self.num_heads, channels // self.num_heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        if mask is None:
            query, key, value = qkv.flatten(1, 2).unbind(0)
            bias = self.relative_position_bias()[None]
        else:
            query, key, value = qkv.flatten(2, 3).unbind(0)
            bias = (self.relative_position_bias() + mask[:, None]).flatten(0, 1)[None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        attended = attended.view(batch, num_windows, self.num_heads, area, channels // self.num_heads)
        return self.proj(attended.transpose(2, 3).flatten(3))

    def relative_position_bias(self) -> Tensor:
        """The bias of every pair of cells, (num_heads, M M, M M)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


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
        return self.fc2(functional.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for whole samples (Huang et al., 2016, arXiv:1603.09382).

    Args:
        rate: The probability of dropping; kept samples are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        """The rate, for the printed module."""
        return f"rate={self.rate:.3f}"


class SwinBlock(nn.Module):
    """One Swin block: (shifted) window attention, then an MLP, both residual (eq. 3).

    Args:
        dim: The number of channels C.
        num_heads: The number of attention heads.
        window_size: M, in cells.
        shift_size: By how many cells the windows are shifted, 0 for none.
        mlp_ratio: Hidden channels of the MLP over C.
        qkv_bias: Whether queries, keys and values have a bias.
        drop_path_rate: Stochastic depth of both branches.
        window_rule: See `SwinConfig.window_rule`.
        shift_mask_value: See `SwinConfig.shift_mask_value`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
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
        self.attn = WindowAttention(dim, num_heads, window_size, qkv_bias)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) to the same shape, any h and w."""
        x = x + self.drop_path(self.shifted_window_attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def shifted_window_attention(self, x: Tensor) -> Tensor:
        """Attention within the windows of the padded, shifted map; (B, h, w, C) to the same shape."""
        height, width = x.shape[1:3]
        shift_hw = self._shift_of((height, width))
        back_hw = (-shift_hw[0], -shift_hw[1])
        shifted = shift_hw != (0, 0)
        if self.window_rule == "timm" and shifted:
            x = torch.roll(x, back_hw, dims=(1, 2))
        x = pad_to_multiple(x, self.window_size)
        padded_hw = (x.shape[1], x.shape[2])
        if self.window_rule != "timm" and shifted:
            x = torch.roll(x, back_hw, dims=(1, 2))

        mask = None
        if shifted:
            mask = shift_mask(padded_hw, self.window_size, shift_hw, self.shift_mask_value, x.dtype, x.device)
        windows = self.attn(window_partition(x, self.window_size), mask)
        x = window_merge(windows, self.window_size, padded_hw)

        if self.window_rule == "timm":
            x = x[:, :height, :width]
        if shifted:
            x = torch.roll(x, shift_hw, dims=(1, 2))
        return x[:, :height, :width]

    def _shift_of(self, size_hw: SizeHW) -> SizeHW:
        if self.window_rule == "dense" or self.shift_size == 0:
            return (self.shift_size, self.shift_size)
        fits_h, fits_w = size_hw[0] <= self.window_size, size_hw[1] <= self.window_size
        return (0 if fits_h else self.shift_size, 0 if fits_w else self.shift_size)


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
        x = pad_to_multiple(x, 2)
        # The published order: down the first column, then down the second.
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))


class SwinStage(nn.Module):
    """The blocks of one stage and the patch merging that leads to the next.

    Args:
        config: The backbone's configuration.
        stage: The index of this stage in `config.depths`.
        merge: Whether a next stage follows.
    """

    def __init__(self, config: SwinConfig, stage: int, merge: bool) -> None:
        super().__init__()
        dim, window_size = config.stage_channels(stage), config.stage_window_size(stage)
        self.recompute = stage in config.checkpoint_stages
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                num_heads=config.num_heads[stage],
                window_size=window_size,
                shift_size=window_size // 2 if block % 2 == 1 else 0,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                drop_path_rate=drop_path_rate,
                window_rule=config.window_rule,
                shift_mask_value=config.shift_mask_value,
            )
            for block, drop_path_rate in enumerate(config.drop_path_rates()[stage])
        )
        self.downsample = PatchMerging(dim) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the stage's own map, of the same shape, and what the next stage reads: that map, merged."""
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """The backbone. `feature_specs` tells the channels and the stride of each returned map.

    Args:
        config: What to build. See `SwinConfig`.

    Example:
        >>> config = SwinConfig(embed_dim=8, depths=(1, 1), num_heads=(1, 2), out_features=("c2", "c3"))
        >>> backbone = SwinTransformer(config)
        >>> {name: tuple(map.shape) for name, map in backbone(torch.rand(1, 3, 97, 131)).items()}
        {'c2': (1, 8, 25, 33), 'c3': (1, 16, 13, 17)}
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        num_stages = config.num_built_stages
        self.patch_embed = PatchEmbed(config.patch_size, config.in_channels, config.embed_dim, config.patch_norm)
        self.absolute_pos_embed: nn.Parameter | None = None
        if config.absolute_pos_embed_hw is not None:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, config.embed_dim, *config.absolute_pos_embed_hw))
        self.layers = nn.ModuleList(
            SwinStage(config, stage, merge=stage < num_stages - 1) for stage in range(num_stages)
        )
        self.feature_specs: dict[str, FeatureSpec] = {}
        for stage, name in enumerate(STAGE_NAMES[:num_stages]):
            if name in config.out_features:
                channels = config.stage_channels(stage)
                self.feature_specs[name] = FeatureSpec(channels, config.patch_size * 2**stage)
                self.add_module(f"norm{stage}", nn.LayerNorm(channels) if config.output_norm else nn.Identity())
        self.reset_parameters()
        for module in self._frozen_modules():
            module.requires_grad_(False)
        if config.frozen_stages and self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
        self.train()

    def reset_parameters(self) -> None:
        """The official initialisation: normal(0, 0.02) cut at 2, biases 0; the patch convolution keeps torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if self.absolute_pos_embed is not None:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Multi-scale features.

        Args:
            images: (B, in_channels, H, W) float, normalised as the weights expect; any H, W >= 1.

        Returns:
            For each name of `config.out_features`, finest first: (B, channels, ceil(H / stride), ceil(W / stride)),
            after its own LayerNorm where `config.output_norm`. The memory format is channels-last.
        """
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            x = x + self._position_embedding((x.shape[1], x.shape[2]))
        features = {}
        for stage, (name, layer) in enumerate(zip(STAGE_NAMES, self.layers, strict=False)):
            stage_map, x = layer(x)
            if name in self.feature_specs:
                features[name] = self.get_submodule(f"norm{stage}")(stage_map).permute(0, 3, 1, 2)
        return features

    def train(self, mode: bool = True) -> SwinTransformer:
        """As `torch.nn.Module.train`, but frozen stages stay in evaluation mode. Returns self."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _position_embedding(self, size_hw: SizeHW) -> Tensor:
        assert self.absolute_pos_embed is not None
        embedding: Tensor = self.absolute_pos_embed
        if tuple(embedding.shape[2:]) != size_hw:
            embedding = functional.interpolate(embedding, size=size_hw, mode="bicubic", align_corners=False)
        return embedding.permute(0, 2, 3, 1)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.config.frozen_stages == 0:
            return []
        frozen: list[nn.Module] = [self.patch_embed]
        for stage in range(min(self.config.frozen_stages, len(self.layers))):
            frozen.append(self.layers[stage])
            if STAGE_NAMES[stage] in self.feature_specs:
                frozen.append(self.get_submodule(f"norm{stage}"))
        return frozen


def create_backbone(variant: str, weights: str | None = None, **changes: Any) -> SwinTransformer:  # noqa: ANN401
    """Build a published variant.

    Args:
        variant: "swin_t", "swin_s", "swin_b", "swin_l", or one of these with "_w12_384".
        weights: A weights file to load; None leaves random weights.
        changes: Fields of `SwinConfig` to set differently, such as `in_channels=4` or `frozen_stages=2`.

    Raises:
        ConfigError: The variant or a field is unknown.
        CheckpointError: The weights file is damaged or does not fit.
    """
    backbone = SwinTransformer(variant_config(variant, **changes))
    if weights is not None:
        from swin_dense.weights import load_weights

        load_weights(backbone, weights)
    return backbone
