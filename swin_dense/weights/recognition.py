"""Which family a file is of, told by its names and shapes, and its tensors under this library's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swin_dense.config import SwinConfig, WindowRule
from swin_dense.errors import CheckpointError
from swin_dense.weights import backbone_names, head_names
from swin_dense.weights.backbone_config import backbone_faults, config_fields
from swin_dense.weights.rules import Rule, rename, to_own_names

BACKBONE = "backbone."
COMPUTED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


@dataclass(frozen=True)
class Recognised:
    """The tensors of a file under this library's names.

    Attributes:
        source: The file, for messages.
        family: "official", "mmdet", "mmseg", "detectron2", "torchvision", "timm", "huggingface", "smp" or "swin_dense".
        head: What stands on the backbone: "classifier", "mask_rcnn", "cascade_mask_rcnn", "upernet", or None.
        tensors: By own name: the backbone under "backbone.", a classifier's as "final_norm." and "head.".
        changes: What happened to the values of a tensor, by own name, where anything did.
        origins: The file's name of a tensor, by own name.
        unused: The file's names that no part of these models has, with how many numbers each holds.
        fields: Of `SwinConfig`, what the file tells; empty where it holds no Swin.
        faults: What its backbone lacks or has in another shape than its other tensors imply.
    """

    source: str
    family: str
    head: str | None
    tensors: dict[str, Tensor]
    changes: dict[str, str]
    origins: dict[str, str]
    unused: dict[str, int]
    fields: dict[str, Any]
    faults: tuple[str, ...]

    @property
    def variant(self) -> str | None:
        """The published variant of these sizes, as far as the file tells its window; None where there is none."""
        return SwinConfig.from_dict(self.fields).variant if "window_size" in self.fields else None


@dataclass(frozen=True)
class _BackboneLayout:
    """How to know a family's backbone, and what it is called there.

    Attributes:
        family: Its name.
        first_block: A name that only this family's first block has.
        rules: Its table, by Swin version.
        body_parts: What some of the family's models put before the body's names, but not before norms and heads.
    """

    family: str
    first_block: str
    rules: Mapping[int, tuple[Rule, ...]]
    body_parts: tuple[str, ...] = ()


def _either(rules: tuple[Rule, ...]) -> dict[int, tuple[Rule, ...]]:
    return {1: rules, 2: rules}


_HUGGING_FACE_PARTS = ("swin.", "swinv2.", "model.")
_LAYOUTS = (
    _BackboneLayout("official", "layers.0.blocks.0.attn.qkv.weight", _either(backbone_names.OFFICIAL_DENSE)),
    _BackboneLayout("timm", "layers_0.blocks.0.attn.qkv.weight", _either(backbone_names.TIMM_FEATURES)),
    _BackboneLayout("mmdet", "stages.0.blocks.0.attn.w_msa.qkv.weight", backbone_names.OPENMMLAB),
    _BackboneLayout("torchvision", "1.0.attn.qkv.weight", backbone_names.TORCHVISION, ("features.",)),
    _BackboneLayout(
        "huggingface",
        "encoder.layers.0.blocks.0.attention.self.query.weight",
        _either(backbone_names.HUGGING_FACE),
        _HUGGING_FACE_PARTS,
    ),
    _BackboneLayout(
        "huggingface",
        "encoder.layers.0.blocks.0.attention.q_proj.weight",
        _either(backbone_names.HUGGING_FACE_IN_MEMORY),
        _HUGGING_FACE_PARTS,
    ),
)

# (family, head, a name that only this head has, its table); the cascade's names are looked for first.
_HEADS = (
    ("mmdet", "cascade_mask_rcnn", "roi_head.bbox_head.0.fc_cls.weight", head_names.OPENMMLAB_CASCADE_MASK_RCNN),
    ("mmdet", "mask_rcnn", "roi_head.bbox_head.fc_cls.weight", head_names.OPENMMLAB_MASK_RCNN),
    ("detectron2", "mask_rcnn", "proposal_generator.rpn_head.conv.weight", head_names.DETECTRON2_MASK_RCNN),
    ("swin_dense", "cascade_mask_rcnn", "roi_heads.box_predictor.0.cls_score.weight", head_names.SWIN_DENSE_DETECTOR),
    ("swin_dense", "mask_rcnn", "fpn.pyramid.inner_blocks.0.0.weight", head_names.SWIN_DENSE_DETECTOR),
    ("torchvision", "mask_rcnn", "roi_heads.box_predictor.cls_score.weight", head_names.TORCHVISION_MASK_RCNN),
    ("mmseg", "upernet", "decode_head.conv_seg.weight", head_names.OPENMMLAB_UPERNET),
    ("huggingface", "upernet", "decode_head.classifier.weight", head_names.HUGGING_FACE_UPERNET),
    ("smp", "upernet", "decoder.psp.out_conv.0.weight", head_names.SMP_UPERNET),
)
# What a format has no name for is written under this library's own, see writing.py.
_KEPT_NORMS = (rename("backbone.norm{stage}.*", "backbone.norm{stage}.*"), rename("final_norm.*", "final_norm.*"))
_KEPT_HEAD = (rename("head.*", "head.*"),)


def recognise(file_tensors: Mapping[str, Tensor], source: str) -> Recognised:
    """Tell a file's family by its names, and translate them.

    Args:
        file_tensors: By the file's names, without wrappers.
        source: The file, for messages.

    Raises:
        CheckpointError: Tensors have shapes that no Swin of this family has.
    """
    try:
        return _recognise(file_tensors, source)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _recognise(file_tensors: Mapping[str, Tensor], source: str) -> Recognised:
    head_family, head, head_rules = _find_head(file_tensors)
    heads = to_own_names(file_tensors, head_rules)
    norms = to_own_names(heads.rest, _KEPT_NORMS)
    own = {**heads.tensors, **norms.tensors}
    found = _find_backbone(norms.rest)
    if found is None:
        return Recognised(source, head_family, head, own, heads.changes, heads.origins, _sizes(norms.rest), {}, ())
    layout, outer = found
    inside, outside, full_names = _split(norms.rest, layout, outer)
    family, rules = _family_and_rules(layout, outer, head_family, inside)
    body = to_own_names(inside, rules)
    kept = to_own_names(outside, _KEPT_HEAD)
    own |= {**body.tensors, **kept.tensors}
    if head is None and "head.weight" in own:
        head = "classifier"
        if family == "official" and outer == BACKBONE:
            family, own = "swin_dense", _with_final_norm(own)

    changes = {**heads.changes, **body.changes}
    buffers = {name: value for name, value in own.items() if name.endswith(COMPUTED_BUFFERS)}
    own = {name: value for name, value in own.items() if name not in buffers}
    fields = config_fields(_without_prefix(own), _without_prefix(buffers))
    fields["window_rule"] = _window_rule(layout, family, own, fields)
    faults, strangers = backbone_faults(_without_prefix(own), fields)
    origins = {**heads.origins, **{name: full_names[inner] for name, inner in body.origins.items()}}
    unused = {**{full_names[name]: value for name, value in body.rest.items()}, **kept.rest}
    for name in strangers:
        value = own.pop(BACKBONE + name)
        unused[origins.get(BACKBONE + name, BACKBONE + name)] = value
    return Recognised(source, family, head, own, changes, origins, _sizes(unused), fields, tuple(faults))


def _find_head(tensors: Mapping[str, Tensor]) -> tuple[str, str | None, tuple[Rule, ...]]:
    for family, head, first_name, rules in _HEADS:
        if first_name in tensors:
            return family, head, rules
    return "unknown", None, ()


def _find_backbone(tensors: Mapping[str, Tensor]) -> tuple[_BackboneLayout, str] | None:
    """The layout, and what precedes the names of the backbone; the shortest where a file holds several."""
    for layout in _LAYOUTS:
        prefixes = [name.removesuffix(layout.first_block) for name in tensors if name.endswith(layout.first_block)]
        prefixes = [prefix for prefix in prefixes if prefix == "" or prefix.endswith(".")]
        if prefixes:
            prefix = min(prefixes, key=len)
            part = next((part for part in layout.body_parts if prefix == part or prefix.endswith(f".{part}")), "")
            return layout, prefix.removesuffix(part)
    return None


def _split(
    tensors: Mapping[str, Tensor], layout: _BackboneLayout, outer: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The backbone's tensors without prefix and body part, all others, and the full names of the former."""
    inside, outside, full_names = {}, {}, {}
    for name, value in tensors.items():
        if not name.startswith(outer):
            outside[name] = value
            continue
        inner = name.removeprefix(outer)
        part = next((part for part in layout.body_parts if inner.startswith(part)), "")
        inner = inner.removeprefix(part)
        inside[inner], full_names[inner] = value, name
    return inside, outside, full_names


def _family_and_rules(
    layout: _BackboneLayout, outer: str, head_family: str, inside: Mapping[str, Tensor]
) -> tuple[str, tuple[Rule, ...]]:
    version = 2 if any(name.endswith(".logit_scale") for name in inside) else 1
    rules = layout.rules[version]
    if layout.family == "mmdet":
        return ("mmseg" if head_family == "mmseg" else "mmdet"), rules
    if layout.family == "timm":
        return ("smp" if head_family == "smp" else "timm"), rules
    if layout.family != "official":
        return layout.family, rules
    starts_with_merging = _any_starts_with(inside, "layers.1.downsample.") and not _any_starts_with(
        inside, "layers.0.downsample."
    )
    if starts_with_merging or "head.fc.weight" in inside:
        return ("smp" if head_family == "smp" else "timm"), backbone_names.TIMM
    if _any_starts_with(inside, "norm."):
        return "official", backbone_names.OFFICIAL_CLASSIFICATION
    if outer.endswith("bottom_up."):
        return "detectron2", rules
    return (head_family if head_family in ("detectron2", "torchvision", "swin_dense") else "official"), rules


def _any_starts_with(tensors: Mapping[str, Tensor], start: str) -> bool:
    return any(name.startswith(start) for name in tensors)


def _with_final_norm(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This library's classifier: the norm of its last stage is what others call the final norm."""
    last = max((name.split(".")[1] for name in own if name.startswith(f"{BACKBONE}norm")), default="norm")
    return {name.replace(f"{BACKBONE}{last}.", "final_norm."): value for name, value in own.items()}


def _window_rule(
    layout: _BackboneLayout, family: str, own: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> WindowRule:
    if family in ("timm", "smp"):
        return "timm"
    if layout.family == "torchvision":
        return "classification"
    if layout.family == "huggingface":
        return "dense" if fields["output_norm"] else "classification"
    return "classification" if "final_norm.weight" in own and not fields["output_norm"] else "dense"


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value.numel() for name, value in tensors.items()}


def _without_prefix(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(BACKBONE): value for name, value in own.items() if name.startswith(BACKBONE)}
