"""The numbers that define a Swin Transformer, and the published variants. Needs no torch.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (Liu et al., 2021), https://arxiv.org/abs/2103.14030.
Swin Transformer V2: Scaling Up Capacity and Resolution (Liu et al., 2022), https://arxiv.org/abs/2111.09883.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from swin_dense.errors import ConfigError
from swin_dense.typed_values import build, did_you_mean, plain

WindowRule = Literal["dense", "classification", "timm"]

WINDOW_RULES: tuple[WindowRule, ...] = ("dense", "classification", "timm")
STAGE_NAMES = ("c2", "c3", "c4", "c5")


@dataclass(frozen=True)
class SwinConfig:
    """Everything that decides what a `SwinTransformer` computes.

    Attributes:
        version: 1 is Swin, 2 is Swin V2 (cosine attention, position bias from a small network, norms after branches).
        embed_dim: The number of channels C of the first stage; stage i has 2^i C.
        depths: The number of blocks of each stage; one to four stages.
        num_heads: The number of attention heads of each stage; divides that stage's channels.
        window_size: The window side M in cells, one number or one per stage.
        patch_size: The side of a patch in pixels; the stride of the first stage.
        in_channels: The number of image channels.
        mlp_ratio: Hidden channels of the MLP over its input channels.
        qkv_bias: Whether the query, key and value projections have a bias.
        patch_norm: Whether the patch embedding ends in a LayerNorm.
        absolute_pos_embed_hw: The grid of a learnt absolute position embedding in cells, or None for none. Another
            map size interpolates it (bicubic).
        pretrained_window_sizes: Swin V2 only: the window each stage's position bias was trained with, in cells, where
            it is not `window_size`; offsets are measured against it.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 over all blocks.
        window_rule: What happens where a map does not divide into windows. "dense": pad, then shift, always shift odd
            blocks (the official detection and segmentation code). "classification": the same, but no shift along a
            side that fits one window (the official classifier, torchvision). "timm": no shift along a side that fits
            one window, and shift before padding.
        shift_mask_value: What is added to the attention logits of cells that only the cyclic shift made neighbours.
        output_norm: Whether each returned map passes its own LayerNorm; without, raw stage maps come out.
        out_features: The maps to return, of "c2", "c3", "c4", "c5" (the outputs of stages 1 to 4). Stages after the
            last one are not built.
        frozen_stages: 0 freezes nothing; k freezes the patch embedding and the first k stages with their patch
            merging and output norm: no gradients, always in evaluation mode.
        checkpoint_stages: Indices into `depths` of the stages that recompute activations in the backward pass.

    Raises:
        ConfigError: A number is out of range, or two contradict each other.
    """

    version: int = 1
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, ...] = 7
    patch_size: int = 4
    in_channels: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    patch_norm: bool = True
    absolute_pos_embed_hw: tuple[int, int] | None = None
    pretrained_window_sizes: tuple[int, ...] | None = None
    drop_path_rate: float = 0.2
    window_rule: WindowRule = "dense"
    shift_mask_value: float = -100.0
    output_norm: bool = True
    out_features: tuple[str, ...] = STAGE_NAMES
    frozen_stages: int = 0
    checkpoint_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._require(self.version in (1, 2), "version", "1 (Swin) or 2 (Swin V2)")
        self._require(1 <= len(self.depths) <= len(STAGE_NAMES), "depths", "one to four numbers")
        self._require(all(depth >= 1 for depth in self.depths), "depths", "numbers from 1")
        self._require(
            len(self.num_heads) == len(self.depths), "num_heads", f"{len(self.depths)} numbers, as depths has"
        )
        for stage, heads in enumerate(self.num_heads):
            channels = self.stage_channels(stage)
            divides = heads >= 1 and channels % heads == 0
            self._require(divides, "num_heads", f"divisors of the stage channels (stage {stage + 1} has {channels})")
        windows = self.window_size if isinstance(self.window_size, tuple) else (self.window_size,) * len(self.depths)
        self._require(len(windows) == len(self.depths), "window_size", f"one number or {len(self.depths)}")
        self._require(all(window >= 1 for window in windows), "window_size", "numbers from 1")
        for name in ("embed_dim", "patch_size", "in_channels"):
            self._require(getattr(self, name) >= 1, name, "a number from 1")
        self._require(self.mlp_ratio > 0, "mlp_ratio", "a number above 0")
        self._require(0 <= self.drop_path_rate < 1, "drop_path_rate", "a number from 0 up to, not including, 1")
        self._require(self.window_rule in WINDOW_RULES, "window_rule", f"one of {', '.join(WINDOW_RULES)}")
        names = STAGE_NAMES[: len(self.depths)]
        known = set(self.out_features) <= set(names) and len(set(self.out_features)) == len(self.out_features)
        self._require(bool(self.out_features) and known, "out_features", f"some of {', '.join(names)}, each once")
        self._require(0 <= self.frozen_stages <= len(self.depths), "frozen_stages", f"0 to {len(self.depths)}")
        stages = set(range(len(self.depths)))
        self._require(
            set(self.checkpoint_stages) <= stages, "checkpoint_stages", f"indices 0 to {len(self.depths) - 1}"
        )
        pretrained = self.pretrained_window_sizes
        fits = pretrained is None or (
            self.version == 2 and len(pretrained) == len(self.depths) and min(pretrained) >= 2
        )
        self._require(fits, "pretrained_window_sizes", f"{len(self.depths)} numbers from 2, for version 2 only")
        grid = self.absolute_pos_embed_hw
        self._require(grid is None or (len(grid) == 2 and min(grid) >= 1), "absolute_pos_embed_hw", "(height, width)")

    def _require(self, condition: bool, field: str, wanted: str) -> None:
        if not condition:
            raise ConfigError(f"SwinConfig.{field} must be {wanted}, got {getattr(self, field)!r}.")

    @property
    def variant(self) -> str | None:
        """The published variant of these sizes, such as "swin_t"; None where there is none."""
        sizes = ("version", "embed_dim", "depths", "num_heads", "patch_size", "mlp_ratio", "pretrained_window_sizes")

        def described(config: SwinConfig) -> list[Any]:
            windows = [config.stage_window_size(stage) for stage in range(len(config.depths))]
            return [*(getattr(config, name) for name in sizes), windows]

        return next((name for name, config in VARIANTS.items() if described(config) == described(self)), None)

    @property
    def num_built_stages(self) -> int:
        """How many stages exist: none after the last output."""
        return max(STAGE_NAMES.index(name) for name in self.out_features) + 1

    def stage_channels(self, stage: int) -> int:
        """The channels of the stage with this index, 2^stage C."""
        return self.embed_dim * 2**stage

    def stage_window_size(self, stage: int) -> int:
        """The window side M of the stage with this index, in cells."""
        return self.window_size[stage] if isinstance(self.window_size, tuple) else self.window_size

    def stage_pretrained_window_size(self, stage: int) -> int:
        """The window side that offsets are measured against in the stage with this index; Swin V2 only."""
        sizes = self.pretrained_window_sizes
        return self.stage_window_size(stage) if sizes is None else sizes[stage]

    def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
        """The stochastic depth of every block, stage by stage: linear from 0 to `drop_path_rate` over all blocks."""
        last = max(sum(self.depths) - 1, 1)
        rates = [self.drop_path_rate * block / last for block in range(sum(self.depths))]
        starts = [sum(self.depths[:stage]) for stage in range(len(self.depths))]
        return tuple(tuple(rates[start : start + depth]) for start, depth in zip(starts, self.depths, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types (tuples become lists)."""
        return plain(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SwinConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: A field is unknown, or a value has the wrong type or is out of range.
        """
        return build(cls, fields, "SwinConfig")


def _published_variants() -> dict[str, SwinConfig]:
    # Table 7 of the paper: C, depths, heads. "w12" is the window of the models published at 384 pixels.
    sizes = {
        "swin_t": SwinConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
        "swin_s": SwinConfig(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
        "swin_b": SwinConfig(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
        "swin_l": SwinConfig(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    }
    wide = {f"{name}_w12_384": dataclasses.replace(config, window_size=12) for name, config in sizes.items()}
    # Swin V2, table of the official repository. A window never exceeds the map that the model was published for.
    v2 = {
        name.replace("swin_", "swin_v2_"): dataclasses.replace(config, version=2, window_size=8)
        for name, config in sizes.items()
    }
    v2_w16 = {f"{name}_w16_256": dataclasses.replace(c, window_size=(16, 16, 16, 8)) for name, c in v2.items()}
    v2_12to16 = {
        f"{name}_w12to16_256": dataclasses.replace(
            v2[name], window_size=(16, 16, 16, 8), pretrained_window_sizes=(12, 12, 12, 6)
        )
        for name in ("swin_v2_b", "swin_v2_l")
    }
    v2_12to24 = {
        f"{name}_w12to24_384": dataclasses.replace(
            v2[name], window_size=(24, 24, 24, 12), pretrained_window_sizes=(12, 12, 12, 6)
        )
        for name in ("swin_v2_b", "swin_v2_l")
    }
    return {**sizes, **wide, **v2, **v2_w16, **v2_12to16, **v2_12to24}


VARIANTS: Mapping[str, SwinConfig] = _published_variants()


def variant_config(name: str, **changes: Any) -> SwinConfig:  # noqa: ANN401 - the fields of SwinConfig
    """The configuration of a published variant, with some fields changed.

    Args:
        name: A key of `VARIANTS`, such as "swin_t" or "swin_b_w12_384".
        changes: Fields of `SwinConfig` to set differently.

    Raises:
        ConfigError: The variant or a field is unknown.
    """
    if name not in VARIANTS:
        raise ConfigError(f"there is no Swin variant {name!r}{did_you_mean(name, list(VARIANTS))}")
    return SwinConfig.from_dict({**vars(VARIANTS[name]), **changes})
