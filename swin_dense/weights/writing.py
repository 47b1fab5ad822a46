"""Weights into any family's format.

What a format has no name for, such as the norms of dense maps in a classifier's, is written under this library's own
name, so that nothing is lost and the way back is bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_dense.attention import log_offsets
from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError
from swin_dense.training.atomic_file import atomic_write
from swin_dense.weights import backbone_names, head_names
from swin_dense.weights.recognition import BACKBONE, Recognised
from swin_dense.weights.rules import Rule, to_file_names
from swin_dense.windows import relative_position_index

Heads = Mapping[str, tuple[Rule, ...]]


@dataclass(frozen=True)
class _Format:
    """How a family writes a model.

    Attributes:
        rules: The backbone's table, by Swin version.
        heads: The heads' tables; a head that is not in here keeps this library's names.
        alone: What precedes the names of a backbone without head.
        under_head: What precedes them under one of `heads`.
        body: What else precedes them, but not final norm and head.
        classifier_body: The same in a classifier, by Swin version.
        classifier: The backbone's table in a classifier, where it is another one.
        stores_index: Whether position indices, which follow from the window, are part of a file.
        flat_index: Whether they are flat.
    """

    rules: Mapping[int, tuple[Rule, ...]]
    heads: Heads = field(default_factory=dict)
    alone: str = ""
    under_head: str = "backbone."
    body: str = ""
    classifier_body: Mapping[int, str] = field(default_factory=dict)
    classifier: tuple[Rule, ...] | None = None
    stores_index: bool = False
    flat_index: bool = False


_OPENMMLAB_HEADS = {
    "mask_rcnn": head_names.OPENMMLAB_MASK_RCNN,
    "cascade_mask_rcnn": head_names.OPENMMLAB_CASCADE_MASK_RCNN,
    "upernet": head_names.OPENMMLAB_UPERNET,
}
_OPENMMLAB = _Format(
    backbone_names.OPENMMLAB,
    {**_OPENMMLAB_HEADS, "classifier": ()},
    stores_index=True,
)
_FORMATS = {
    "official": _Format(
        {1: backbone_names.OFFICIAL_DENSE, 2: backbone_names.OFFICIAL_DENSE},
        _OPENMMLAB_HEADS,
        classifier=backbone_names.OFFICIAL_CLASSIFICATION,
        stores_index=True,
    ),
    "mmdet": _OPENMMLAB,
    "mmseg": _OPENMMLAB,
    "torchvision": _Format(
        backbone_names.TORCHVISION,
        {"mask_rcnn": head_names.TORCHVISION_MASK_RCNN},
        under_head="backbone.body.",
        body="features.",
        stores_index=True,
        flat_index=True,
    ),
    "timm": _Format({1: backbone_names.TIMM, 2: backbone_names.TIMM}),
    "huggingface": _Format(
        {1: backbone_names.HUGGING_FACE, 2: backbone_names.HUGGING_FACE},
        {"upernet": head_names.HUGGING_FACE_UPERNET},
        classifier_body={1: "swin.", 2: "swinv2."},
    ),
    "detectron2": _Format(
        {1: backbone_names.OFFICIAL_DENSE, 2: backbone_names.OFFICIAL_DENSE},
        {"mask_rcnn": head_names.DETECTRON2_MASK_RCNN},
        alone="backbone.bottom_up.",
        under_head="backbone.bottom_up.",
        stores_index=True,
    ),
}
FORMATS = tuple(_FORMATS)
_OUTSIDE_BODY = ("norm.", "head.", "classifier.", "hidden_states_norms.")


@dataclass(frozen=True)
class Written:
    """Tensors in a family's format.

    Attributes:
        tensors: By the family's names.
        kept: Those for which the family has no name, under this library's.
    """

    tensors: dict[str, Tensor]
    kept: tuple[str, ...]


def in_format(found: Recognised, name: str) -> Written:
    """Translate recognised weights.

    Args:
        found: What was read, see `recognition.recognise`.
        name: One of `FORMATS`.

    Raises:
        ConfigError: There is no such format, or no backbone in the weights.
    """
    if name not in _FORMATS:
        raise ConfigError(f"there is no format {name!r}; known are {', '.join(FORMATS)}.")
    if not found.fields:
        raise ConfigError(f"{found.source}: no Swin backbone in it to write.")
    style = _FORMATS[name]
    version = found.fields["version"]
    is_classifier = found.head == "classifier"
    heads = to_file_names(found.tensors, style.heads.get(found.head or "", ()))
    rules = style.classifier if is_classifier and style.classifier is not None else style.rules[version]
    body = to_file_names({**heads.rest, **_buffers(found.fields, style)}, rules)
    outer = style.under_head if found.head in style.heads else style.alone
    part = style.classifier_body.get(version, style.body) if is_classifier else style.body
    if outer.endswith("body."):
        part = ""  # torchvision's feature extractor takes the body out of its classifier
    placed = {
        outer + ("" if name_inside.startswith(_OUTSIDE_BODY) else part) + name_inside: value
        for name_inside, value in body.tensors.items()
    }
    tensors = {**placed, **heads.tensors, **body.rest}
    return Written({key: value.contiguous() for key, value in tensors.items()}, tuple(body.rest))


def write_weights(
    path: str | Path, written: Written, name: str, head: str | None, class_names: Sequence[str] | None
) -> None:
    """Write a file as the family itself does; one of that name is replaced in one step.

    Args:
        path: Ends in .safetensors, or in .pth, .pt or .bin for a torch file.
        written: What to write.
        name: The format.
        head: Of the model.
        class_names: Go along where the format has a place for them.

    Raises:
        ConfigError: The name of the file ends in something else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        with atomic_write(path) as file:
            file.write(save(written.tensors, metadata={"format": "pt"}))
        return
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ConfigError(f"{path}: weights are written to .safetensors, .pth, .pt or .bin files.")
    with atomic_write(path) as file:
        torch.save(_wrapped(written.tensors, name, head, class_names), file)


def _wrapped(
    tensors: dict[str, Tensor], name: str, head: str | None, class_names: Sequence[str] | None
) -> dict[str, Any]:
    if name in ("mmdet", "mmseg") or (name == "official" and head not in (None, "classifier")):
        meta = (
            {}
            if class_names is None
            else {"CLASSES": tuple(class_names), "dataset_meta": {"classes": tuple(class_names)}}
        )
        return {"meta": meta, "state_dict": tensors}
    return {"model": tensors} if name in ("official", "detectron2") else dict(tensors)


def _buffers(fields: Mapping[str, Any], style: _Format) -> dict[str, Tensor]:
    """What follows from the window and is yet stored: indices, and the offsets that the position network of V2 sees."""
    if not style.stores_index or "window_size" not in fields:
        return {}
    config = SwinConfig.from_dict(fields)
    buffers = {}
    for stage, depth in enumerate(config.depths):
        window = config.stage_window_size(stage)
        index = relative_position_index(window)
        for block in range(depth):
            attention = f"{BACKBONE}layers.{stage}.blocks.{block}.attn"
            # A copy for each block: safetensors refuses tensors that share memory.
            buffers[f"{attention}.relative_position_index"] = (index.flatten() if style.flat_index else index).clone()
            if config.version == 2:
                table = log_offsets(window, config.stage_pretrained_window_size(stage))
                buffers[f"{attention}.relative_coords_table"] = table.view(1, 2 * window - 1, 2 * window - 1, 2)
    return buffers
