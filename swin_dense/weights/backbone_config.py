"""What the shapes of a backbone's tensors tell about its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swin_dense.config import STAGE_NAMES, SwinConfig
from swin_dense.errors import CheckpointError, ConfigError
from swin_dense.swin import SwinTransformer

_OFFSET_RANGE = (1e-6, 10.0)  # of the largest in such a table; windows of 2 to 10^8 cells lie well within
_ANY_WINDOW = 8  # stands in where a window is unknown; no parameter of Swin V2 depends on it


def config_fields(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `SwinConfig` that the tensors tell.

    Args:
        tensors: A backbone's parameters by this library's names, without prefix.
        buffers: Computed ones, likewise; they tell the windows of Swin V2.

    Returns:
        All fields that decide what is computed but the window rule; "window_size" is absent where nothing tells it.

    Raises:
        CheckpointError: A tensor that tells something is missing or has an impossible shape.
    """
    shapes = _Shapes(tensors)
    embed_dim, in_channels, patch_size, patch_width = shapes.of("patch_embed.proj.weight", 4)
    if patch_size != patch_width:
        raise shapes.fault("patch_embed.proj.weight", "square patches")
    depths = _depths(tensors)
    blocks = [f"layers.{stage}.blocks.0" for stage in range(len(depths))]
    version = 2 if f"{blocks[0]}.attn.logit_scale" in tensors else 1
    norms = [name for stage, name in enumerate(STAGE_NAMES) if any(key.startswith(f"norm{stage}.") for key in tensors)]
    fields: dict[str, Any] = {
        "version": version,
        "embed_dim": embed_dim,
        "depths": depths,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "mlp_ratio": shapes.of(f"{blocks[0]}.mlp.fc1.weight", 2)[0] / embed_dim,
        "qkv_bias": any(name.endswith((".attn.qkv.bias", ".attn.q_bias", ".attn.v_bias")) for name in tensors),
        "patch_norm": any(name.startswith("patch_embed.norm.") for name in tensors),
        "output_norm": bool(norms),
        "out_features": tuple(norms) or STAGE_NAMES[: len(depths)],
    }
    if "absolute_pos_embed" in tensors:
        fields["absolute_pos_embed_hw"] = shapes.of("absolute_pos_embed", 4)[2:]
    if version == 1:
        tables = [shapes.of(f"{block}.attn.relative_position_bias_table", 2) for block in blocks]
        fields["num_heads"] = tuple(heads for _, heads in tables)
        windows = [_window_of_table(rows) for rows, _ in tables]
        if None in windows:
            name = f"{blocks[windows.index(None)]}.attn.relative_position_bias_table"
            raise shapes.fault(name, "(2M - 1)^2 rows for a window of M")
        fields["window_size"] = _one_or_each(windows)
    else:
        fields["num_heads"] = tuple(shapes.of(f"{block}.attn.logit_scale", 3)[0] for block in blocks)
        windows = [_window_of_buffers(buffers, block) for block in blocks]
        if None not in windows:
            fields["window_size"] = _one_or_each(windows)
            pretrained = [
                _pretrained_window(buffers, block, window) for block, window in zip(blocks, windows, strict=True)
            ]
            if pretrained != windows and None not in pretrained:
                fields["pretrained_window_sizes"] = tuple(pretrained)
    return fields


def backbone_faults(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare a file's backbone with the one that its own configuration describes.

    Args:
        tensors: As for `config_fields`.
        fields: What `config_fields` returned.

    Returns:
        What is missing or has another shape, as sentences; and the names that such a backbone has no place for.

    Raises:
        CheckpointError: No backbone has such numbers.
    """
    try:
        config = SwinConfig(**{"window_size": _ANY_WINDOW, **fields})
    except ConfigError as error:
        raise CheckpointError(f"the shapes of its backbone contradict each other: {error}") from None
    with torch.device("meta"):
        wanted = SwinTransformer(config).state_dict()
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    return faults, [name for name in tensors if name not in wanted]


class _Shapes:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"the backbone is not whole: {name} is missing.")
        if self.tensors[name].ndim != dimensions or self.tensors[name].numel() == 0:
            raise self.fault(name, f"{dimensions} dimensions, none of them 0")
        return tuple(self.tensors[name].shape)

    def fault(self, name: str, wanted: str) -> CheckpointError:
        shape = tuple(self.tensors[name].shape)
        return CheckpointError(f"the backbone's {name} has shape {shape}; expected {wanted}.")


def _depths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    found: dict[int, int] = {}
    for name in tensors:
        if numbers := re.match(r"layers\.([0-9]{1,4})\.blocks\.([0-9]{1,4})\.", name):
            stage, block = int(numbers[1]), int(numbers[2])
            found[stage] = max(found.get(stage, 0), block + 1)
    depths = tuple(found.get(stage, 1) for stage in range(max(found) + 1))
    if sum(depths) > len(tensors):
        raise CheckpointError(f"the backbone is not whole: its numbers tell of {sum(depths)} blocks.")
    return depths


def _window_of_table(rows: int) -> int | None:
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 == 1 else None


def _window_of_buffers(buffers: Mapping[str, Tensor], block: str) -> int | None:
    index = buffers.get(f"{block}.attn.relative_position_index")
    table = buffers.get(f"{block}.attn.relative_coords_table")
    if index is not None:
        return math.isqrt(math.isqrt(index.numel()))  # M M by M M, flat in torchvision's files
    return None if table is None or table.ndim < 2 else (table.shape[-2] + 1) // 2


def _pretrained_window(buffers: Mapping[str, Tensor], block: str, window: int | None) -> int | None:
    """From the largest offset in the table: log2(8 (M - 1) / (M' - 1) + 1) / 3, see `attention.log_offsets`."""
    table = buffers.get(f"{block}.attn.relative_coords_table")
    if table is None or window is None or window < 2:
        return window
    largest = float(table.max()) if table.numel() else 0.0
    if not _OFFSET_RANGE[0] < largest < _OFFSET_RANGE[1]:
        raise CheckpointError(f"the backbone's {block}.attn.relative_coords_table does not hold offsets.")
    return round(8 * (window - 1) / (2 ** (3 * largest) - 1)) + 1


def _one_or_each(numbers: list[int | None]) -> int | tuple[int | None, ...] | None:
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)
