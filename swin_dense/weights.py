"""Weights from files into models, with a receipt of what was loaded.

Understood are files of this library and of the official detection and segmentation code, whose parameter names are the
same; buffers that a model computes for itself (position indices, masks) are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from swin_dense.errors import CheckpointError

_COMPUTED_BUFFERS = ("relative_position_index", "attn_mask", "relative_coords_table", "num_batches_tracked")
_WRAPPER_KEYS = ("model", "state_dict")
_WRAPPER_PREFIXES = ("module.",)
_BACKBONE_PREFIX = "backbone."
_LEAST_BACKBONE_SHARE = 0.95


@dataclass(frozen=True)
class WeightsReport:
    """What became of every tensor.

    Attributes:
        source: The file, or "state dict".
        loaded: Model parameters that were set.
        missing: Model parameters that the file does not hold; they keep their values.
        unused: Tensors of the file that the model has no place for.
        reshaped: Names held by both with different shapes, as "name: file shape, model shape"; not loaded.
        backbone_share: The share of the backbone's numbers that were loaded, 0 to 1.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    reshaped: tuple[str, ...]
    backbone_share: float

    def __str__(self) -> str:
        lines = [
            f"weights: {self.source}: {self.backbone_share:.1%} of the backbone, {len(self.loaded)} tensors loaded"
        ]
        for title, names in (("missing", self.missing), ("unused", self.unused), ("other shape", self.reshaped)):
            if names:
                lines.append(f"  {title}: {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
        return "\n".join(lines)


def load_weights(
    model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor], allow_partial: bool = False
) -> WeightsReport:
    """Set a model's parameters from a file or a state dict.

    A backbone takes its share of a detector's file; a detector or segmenter takes a bare backbone's file into its
    backbone.

    Args:
        model: A `SwinTransformer`, or a model that has one as `.backbone`.
        path_or_state_dict: A .safetensors, .pth, .pt or .bin file, or its tensors.
        allow_partial: Whether less than 95 % of the backbone may be loaded.

    Raises:
        CheckpointError: The file cannot be read, or too little of it fits. The model is then unchanged.
    """
    if isinstance(path_or_state_dict, Mapping):
        source, tensors = "state dict", path_or_state_dict
    else:
        source, tensors = str(path_or_state_dict), read_tensors(path_or_state_dict)
    tensors = _rename_for(model, {_unwrapped(name): value for name, value in tensors.items()})
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(_COMPUTED_BUFFERS)}
    held = {name: value for name, value in tensors.items() if not name.endswith(_COMPUTED_BUFFERS)}
    same_shape = {name: value for name, value in held.items() if name in own and value.shape == own[name].shape}

    backbone_names = [name for name in own if name.startswith(_BACKBONE_PREFIX)] or list(own)
    report = WeightsReport(
        source=source,
        loaded=tuple(name for name in own if name in same_shape),
        missing=tuple(name for name in own if name not in held),
        unused=tuple(name for name in held if name not in own),
        reshaped=tuple(
            f"{name}: {tuple(held[name].shape)}, {tuple(own[name].shape)}"
            for name in own
            if name in held and name not in same_shape
        ),
        backbone_share=_share(own, backbone_names, same_shape),
    )
    if report.backbone_share < _LEAST_BACKBONE_SHARE and not allow_partial:
        raise CheckpointError(
            f"{report}\nless than {_LEAST_BACKBONE_SHARE:.0%} of the backbone would be loaded; "
            "check that file and model are of the same variant, or allow it with allow_partial=True."
        )
    bad = [name for name, value in same_shape.items() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{source}: values that are not finite in {len(bad)} tensors, the first is {bad[0]}.")
    model.load_state_dict(same_shape, strict=False)
    return report


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights file by name, on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such weights file.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}).") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "it ends too early"
        raise CheckpointError(f"{path}: not a whole file of plain tensors ({reason}).") from None
    for key in _WRAPPER_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = (
        {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name; expected a state dict, or one under 'model'.")
    return tensors


def _unwrapped(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _rename_for(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file_is_wrapped = any(name.startswith(_BACKBONE_PREFIX) for name in tensors)
    model_is_wrapped = hasattr(model, "backbone")
    if file_is_wrapped and not model_is_wrapped:
        return {name.removeprefix(_BACKBONE_PREFIX): value for name, value in tensors.items()}
    if model_is_wrapped and not file_is_wrapped:
        return {_BACKBONE_PREFIX + name: value for name, value in tensors.items()}
    return dict(tensors)


def _share(own: Mapping[str, Tensor], names: list[str], loaded: Mapping[str, Tensor]) -> float:
    total = sum(own[name].numel() for name in names)
    return sum(own[name].numel() for name in names if name in loaded) / max(total, 1)
