"""How each family names its heads: one table a family and head, this library's names on the left.

Sources: mmdetection 3.3, mmsegmentation 1.2, the official detection and segmentation code, detectron2, torchvision,
transformers and segmentation-models-pytorch. Class 0 of a detector is background here and in torchvision; OpenMMLab and
detectron2 put it last and give it neither box offsets nor a mask.
"""

from __future__ import annotations

from swin_dense.weights.rules import Convert, Rule, rename
from swin_dense.weights.values import (
    add_background_box,
    add_background_box_unless_shared,
    add_background_mask,
    background_first,
    background_last,
    drop_background_box,
    drop_background_box_unless_shared,
    drop_background_mask,
)


def _background_first(own: str, file: str) -> Rule:
    return Rule((f"{own}.*",), (f"{file}.*",), background_first, background_last, change="class rows: background first")


def _with_background(own: str, file: str, add: Convert, drop: Convert, change: str) -> Rule:
    """Rows that only this library and torchvision have; a file may keep them in a tensor of its own."""
    return Rule((f"{own}.*",), (f"{file}.*", f"{file}.background_*?"), add, drop, change)


def _box_rows(own: str, file: str) -> Rule:
    return _with_background(own, file, add_background_box, drop_background_box, "box rows: background's added")


def _box_rows_unless_shared(own: str, file: str) -> Rule:
    change = "box rows: background's added, where each class has its own"
    return _with_background(own, file, add_background_box_unless_shared, drop_background_box_unless_shared, change)


def _mask_rows(own: str, file: str) -> Rule:
    return _with_background(own, file, add_background_mask, drop_background_mask, "mask rows: background's added")


_OPENMMLAB_PROPOSALS = (
    rename("fpn.pyramid.inner_blocks.{level}.0.*", "neck.lateral_convs.{level}.conv.*"),
    rename("fpn.pyramid.layer_blocks.{level}.0.*", "neck.fpn_convs.{level}.conv.*"),
    rename("rpn.head.conv.0.0.*", "rpn_head.rpn_conv.*"),
    rename("rpn.head.cls_logits.*", "rpn_head.rpn_cls.*"),
    rename("rpn.head.bbox_pred.*", "rpn_head.rpn_reg.*"),
)

# mmdetection and the official detection code.
OPENMMLAB_MASK_RCNN = (
    *_OPENMMLAB_PROPOSALS,
    rename("roi_heads.box_head.fc6.*", "roi_head.bbox_head.shared_fcs.0.*"),
    rename("roi_heads.box_head.fc7.*", "roi_head.bbox_head.shared_fcs.1.*"),
    _background_first("roi_heads.box_predictor.cls_score", "roi_head.bbox_head.fc_cls"),
    _box_rows("roi_heads.box_predictor.bbox_pred", "roi_head.bbox_head.fc_reg"),
    rename("roi_heads.mask_head.{layer}.0.*", "roi_head.mask_head.convs.{layer}.conv.*"),
    rename("roi_heads.mask_predictor.conv5_mask.*", "roi_head.mask_head.upsample.*"),
    _mask_rows("roi_heads.mask_predictor.mask_fcn_logits", "roi_head.mask_head.conv_logits"),
)

OPENMMLAB_CASCADE_MASK_RCNN = (
    *_OPENMMLAB_PROPOSALS,
    rename("roi_heads.box_head.{stage}.5.*", "roi_head.bbox_head.{stage}.shared_fcs.0.*"),
    rename("roi_heads.box_head.{stage}.{layer}.0.*", "roi_head.bbox_head.{stage}.shared_convs.{layer}.conv.*"),
    rename("roi_heads.box_head.{stage}.{layer}.1.*", "roi_head.bbox_head.{stage}.shared_convs.{layer}.bn.*"),
    _background_first("roi_heads.box_predictor.{stage}.cls_score", "roi_head.bbox_head.{stage}.fc_cls"),
    _box_rows_unless_shared("roi_heads.box_predictor.{stage}.bbox_pred", "roi_head.bbox_head.{stage}.fc_reg"),
    rename("roi_heads.mask_head.{stage}.{layer}.0.*", "roi_head.mask_head.{stage}.convs.{layer}.conv.*"),
    rename("roi_heads.mask_predictor.{stage}.conv5_mask.*", "roi_head.mask_head.{stage}.upsample.*"),
    _mask_rows("roi_heads.mask_predictor.{stage}.mask_fcn_logits", "roi_head.mask_head.{stage}.conv_logits"),
)

DETECTRON2_MASK_RCNN = (
    rename("fpn.pyramid.inner_blocks.{level}.0.*", "backbone.fpn_lateral{level+2}.*"),
    rename("fpn.pyramid.layer_blocks.{level}.0.*", "backbone.fpn_output{level+2}.*"),
    rename("rpn.head.conv.0.0.*", "proposal_generator.rpn_head.conv.*"),
    rename("rpn.head.cls_logits.*", "proposal_generator.rpn_head.objectness_logits.*"),
    rename("rpn.head.bbox_pred.*", "proposal_generator.rpn_head.anchor_deltas.*"),
    rename("roi_heads.box_head.fc6.*", "roi_heads.box_head.fc1.*"),
    rename("roi_heads.box_head.fc7.*", "roi_heads.box_head.fc2.*"),
    _background_first("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.cls_score"),
    _box_rows("roi_heads.box_predictor.bbox_pred", "roi_heads.box_predictor.bbox_pred"),
    rename("roi_heads.mask_head.{layer}.0.*", "roi_heads.mask_head.mask_fcn{layer+1}.*"),
    rename("roi_heads.mask_predictor.conv5_mask.*", "roi_heads.mask_head.deconv.*"),
    _mask_rows("roi_heads.mask_predictor.mask_fcn_logits", "roi_heads.mask_head.predictor"),
)

# The second names are those of torchvision's own files from before its convolutions were wrapped.
TORCHVISION_MASK_RCNN = (
    rename("fpn.pyramid.inner_blocks.{level}.0.*", "backbone.fpn.inner_blocks.{level}.0.*"),
    rename("fpn.pyramid.layer_blocks.{level}.0.*", "backbone.fpn.layer_blocks.{level}.0.*"),
    rename("fpn.pyramid.inner_blocks.{level}.0.*", "backbone.fpn.inner_blocks.{level}.*"),
    rename("fpn.pyramid.layer_blocks.{level}.0.*", "backbone.fpn.layer_blocks.{level}.*"),
    rename("rpn.head.conv.0.0.*", "rpn.head.conv.0.0.*"),
    rename("rpn.head.conv.0.0.*", "rpn.head.conv.*"),
    rename("roi_heads.mask_head.{layer}.0.*", "roi_heads.mask_head.{layer}.0.*"),
    rename("roi_heads.mask_head.{layer}.0.*", "roi_heads.mask_head.mask_fcn{layer+1}.*"),
    rename("rpn.*", "rpn.*"),
    rename("roi_heads.*", "roi_heads.*"),
)

# mmsegmentation, the official segmentation code and this library.
OPENMMLAB_UPERNET = (
    rename("decode_head.*", "decode_head.*"),
    rename("auxiliary_head.*", "auxiliary_head.*"),
)

_UPERNET_CONVOLUTIONS = (
    "psp_modules.{pool}.1",
    "bottleneck",
    "lateral_convs.{level}",
    "fpn_convs.{level}",
    "fpn_bottleneck",
    "convs.{layer}",  # of the auxiliary head
)

HUGGING_FACE_UPERNET = tuple(
    rename(f"{head}.{own}", f"{head}.{file}")
    for head in ("decode_head", "auxiliary_head")
    for own, file in (
        ("conv_seg.*", "classifier.*"),
        *((f"{conv}.bn.*", f"{conv}.batch_norm.*") for conv in _UPERNET_CONVOLUTIONS),
        ("*", "*"),
    )
)

SMP_UPERNET = (
    rename("backbone.norm{stage}.*", "decoder.feature_norms.{stage}.*"),
    rename("decode_head.conv_seg.*", "segmentation_head.0.*"),
    *(
        rename(f"decode_head.{own}.{own_part}.*", f"decoder.{file}.{file_part}.*")
        for own, file in (
            ("psp_modules.{pool}.1", "psp.blocks.{pool}.1"),
            ("bottleneck", "psp.out_conv"),
            ("lateral_convs.{2-level}", "fpn_lateral_blocks.{level}.conv_norm_relu"),
            ("fpn_convs.{2-level}", "fpn_conv_blocks.{level}"),
            ("fpn_bottleneck", "fusion_block"),
        )
        for own_part, file_part in (("conv", "0"), ("bn", "1"))
    ),
)

# This library's own detectors.
SWIN_DENSE_DETECTOR = tuple(rename(f"{part}.*", f"{part}.*") for part in ("fpn", "rpn", "roi_heads"))
