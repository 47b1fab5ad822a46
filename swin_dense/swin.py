"""Swin Transformer and Swin V2 as multi-scale backbones: images of any size in, four normalised maps out.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., 2021), https://arxiv.org/abs/2103.14030.
Swin Transformer V2: Scaling Up Capacity and Resolution (Liu et al., 2022), https://arxiv.org/abs/2111.09883, has no
published dense form; here its windows are padded, shifted and masked as those of V1, each stage's window fixed.
Parameter names are those of the official detection and segmentation code, so that its checkpoints need no renaming.

Symbols: images (B, in_channels, H, W); a map (B, h, w, C), channels last inside the backbone; window side M.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swin_dense.attention import CosineWindowAttention, WindowAttention
from swin_dense.blocks import PatchMerging, PatchMergingV2, SwinBlock, SwinBlockV2
from swin_dense.config import STAGE_NAMES, SwinConfig, variant_config
from swin_dense.features import FeatureSpec
from swin_dense.windows import SizeHW, missing_to_multiple


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
        block_class, merging_class = (SwinBlock, PatchMerging) if config.version == 1 else (SwinBlockV2, PatchMergingV2)
        self.blocks = nn.ModuleList(
            block_class(
                dim=dim,
                attention=_attention(config, stage),
                window_size=window_size,
                shift_size=window_size // 2 if block % 2 == 1 else 0,
                mlp_ratio=config.mlp_ratio,
                drop_path_rate=drop_path_rate,
                window_rule=config.window_rule,
                shift_mask_value=config.shift_mask_value,
            )
            for block, drop_path_rate in enumerate(config.drop_path_rates()[stage])
        )
        self.downsample = merging_class(dim) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) to the stage's own map, of the same shape, and what the next stage reads: that map, merged."""
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


def _attention(config: SwinConfig, stage: int) -> WindowAttention:
    dim, num_heads, window_size = config.stage_channels(stage), config.num_heads[stage], config.stage_window_size(stage)
    if config.version == 1:
        return WindowAttention(dim, num_heads, window_size, config.qkv_bias)
    pretrained_window_size = config.stage_pretrained_window_size(stage)
    return CosineWindowAttention(dim, num_heads, window_size, config.qkv_bias, pretrained_window_size)


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
            elif isinstance(module, SwinBlockV2):
                module.reset_parameters()
            elif isinstance(module, WindowAttention) and not isinstance(module, CosineWindowAttention):
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
        variant: A key of `VARIANTS`, such as "swin_t", "swin_b_w12_384" or "swin_v2_t".
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
