from typing import Any

import pytest
import torch

from swin_dense.config import SwinConfig
from swin_dense.heads import cascade_mask_rcnn, mask_rcnn, upernet
from swin_dense.weights import head_names
from swin_dense.weights.head_names import (
    DETECTRON2_MASK_RCNN,
    HUGGING_FACE_UPERNET,
    OPENMMLAB_CASCADE_MASK_RCNN,
    OPENMMLAB_MASK_RCNN,
    OPENMMLAB_UPERNET,
    SMP_UPERNET,
    SWIN_DENSE_DETECTOR,
    TORCHVISION_MASK_RCNN,
)
from swin_dense.weights.rules import to_file_names, to_own_names

CONFIG = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=3)
WIDTHS: dict[str, Any] = {"fpn_channels": 8, "box_head_channels": 8, "mask_head_channels": 8}
MODELS = {
    "mask_rcnn": lambda: mask_rcnn(CONFIG, 3, **WIDTHS),
    "cascade_mask_rcnn": lambda: cascade_mask_rcnn(CONFIG, 3, **WIDTHS),
    "shared": lambda: cascade_mask_rcnn(CONFIG, 3, **WIDTHS, shared_regression=True),
    "upernet": lambda: upernet(CONFIG, 3, channels=8, auxiliary_channels=8),
}
TABLES = {
    "OpenMMLab Mask R-CNN": ("mask_rcnn", OPENMMLAB_MASK_RCNN),
    "OpenMMLab Cascade Mask R-CNN": ("cascade_mask_rcnn", OPENMMLAB_CASCADE_MASK_RCNN),
    "OpenMMLab Cascade Mask R-CNN, shared boxes": ("shared", OPENMMLAB_CASCADE_MASK_RCNN),
    "OpenMMLab UPerNet": ("upernet", OPENMMLAB_UPERNET),
    "detectron2": ("mask_rcnn", DETECTRON2_MASK_RCNN),
    "torchvision": ("mask_rcnn", TORCHVISION_MASK_RCNN),
    "Hugging Face UPerNet": ("upernet", HUGGING_FACE_UPERNET),
    "smp UPerNet": ("upernet", SMP_UPERNET),
    "own detector": ("mask_rcnn", SWIN_DENSE_DETECTOR),
    "own cascade": ("cascade_mask_rcnn", SWIN_DENSE_DETECTOR),
}
# As the families' own code calls them.
EXPECTED = {
    "OpenMMLab Mask R-CNN": {
        "fpn.pyramid.inner_blocks.2.0.weight": "neck.lateral_convs.2.conv.weight",
        "fpn.pyramid.layer_blocks.0.0.bias": "neck.fpn_convs.0.conv.bias",
        "rpn.head.conv.0.0.weight": "rpn_head.rpn_conv.weight",
        "rpn.head.cls_logits.bias": "rpn_head.rpn_cls.bias",
        "rpn.head.bbox_pred.weight": "rpn_head.rpn_reg.weight",
        "roi_heads.box_head.fc6.weight": "roi_head.bbox_head.shared_fcs.0.weight",
        "roi_heads.box_head.fc7.weight": "roi_head.bbox_head.shared_fcs.1.weight",
        "roi_heads.box_predictor.cls_score.weight": "roi_head.bbox_head.fc_cls.weight",
        "roi_heads.box_predictor.bbox_pred.bias": "roi_head.bbox_head.fc_reg.bias",
        "roi_heads.mask_head.3.0.weight": "roi_head.mask_head.convs.3.conv.weight",
        "roi_heads.mask_predictor.conv5_mask.weight": "roi_head.mask_head.upsample.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.weight": "roi_head.mask_head.conv_logits.weight",
    },
    "OpenMMLab Cascade Mask R-CNN": {
        "roi_heads.box_head.1.2.0.weight": "roi_head.bbox_head.1.shared_convs.2.conv.weight",
        "roi_heads.box_head.1.2.1.running_var": "roi_head.bbox_head.1.shared_convs.2.bn.running_var",
        "roi_heads.box_head.2.5.weight": "roi_head.bbox_head.2.shared_fcs.0.weight",
        "roi_heads.box_predictor.0.cls_score.weight": "roi_head.bbox_head.0.fc_cls.weight",
        "roi_heads.box_predictor.2.bbox_pred.weight": "roi_head.bbox_head.2.fc_reg.weight",
        "roi_heads.mask_head.1.3.0.bias": "roi_head.mask_head.1.convs.3.conv.bias",
        "roi_heads.mask_predictor.1.conv5_mask.weight": "roi_head.mask_head.1.upsample.weight",
        "roi_heads.mask_predictor.1.mask_fcn_logits.weight": "roi_head.mask_head.1.conv_logits.weight",
    },
    "detectron2": {
        "fpn.pyramid.inner_blocks.0.0.weight": "backbone.fpn_lateral2.weight",
        "fpn.pyramid.layer_blocks.3.0.weight": "backbone.fpn_output5.weight",
        "rpn.head.cls_logits.weight": "proposal_generator.rpn_head.objectness_logits.weight",
        "rpn.head.bbox_pred.weight": "proposal_generator.rpn_head.anchor_deltas.weight",
        "roi_heads.box_head.fc6.weight": "roi_heads.box_head.fc1.weight",
        "roi_heads.box_predictor.cls_score.weight": "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.mask_head.0.0.weight": "roi_heads.mask_head.mask_fcn1.weight",
        "roi_heads.mask_predictor.conv5_mask.weight": "roi_heads.mask_head.deconv.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.weight": "roi_heads.mask_head.predictor.weight",
    },
    "torchvision": {
        "fpn.pyramid.inner_blocks.1.0.weight": "backbone.fpn.inner_blocks.1.0.weight",
        "roi_heads.mask_head.2.0.weight": "roi_heads.mask_head.2.0.weight",
        "rpn.head.conv.0.0.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.box_predictor.cls_score.weight": "roi_heads.box_predictor.cls_score.weight",
    },
    "Hugging Face UPerNet": {
        "decode_head.conv_seg.weight": "decode_head.classifier.weight",
        "decode_head.psp_modules.3.1.conv.weight": "decode_head.psp_modules.3.1.conv.weight",
        "decode_head.psp_modules.3.1.bn.running_mean": "decode_head.psp_modules.3.1.batch_norm.running_mean",
        "decode_head.lateral_convs.0.bn.weight": "decode_head.lateral_convs.0.batch_norm.weight",
        "decode_head.fpn_bottleneck.bn.bias": "decode_head.fpn_bottleneck.batch_norm.bias",
        "auxiliary_head.convs.0.bn.weight": "auxiliary_head.convs.0.batch_norm.weight",
        "auxiliary_head.conv_seg.bias": "auxiliary_head.classifier.bias",
    },
    "smp UPerNet": {
        "backbone.norm1.weight": "decoder.feature_norms.1.weight",
        "decode_head.psp_modules.3.1.conv.weight": "decoder.psp.blocks.3.1.0.weight",
        "decode_head.bottleneck.bn.weight": "decoder.psp.out_conv.1.weight",
        "decode_head.lateral_convs.0.conv.weight": "decoder.fpn_lateral_blocks.2.conv_norm_relu.0.weight",
        "decode_head.fpn_convs.2.bn.running_var": "decoder.fpn_conv_blocks.0.1.running_var",
        "decode_head.fpn_bottleneck.conv.weight": "decoder.fusion_block.0.weight",
        "decode_head.conv_seg.weight": "segmentation_head.0.weight",
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_every_parameter_of_a_head_has_one_name_and_comes_back(name, randomise):
    kind, table = TABLES[name]
    own = {
        key: value for key, value in randomise(MODELS[kind]()).state_dict().items() if not key.startswith("backbone.")
    }
    if name.startswith("smp"):  # it has no such part
        own = {key: value for key, value in own.items() if not key.startswith("auxiliary_head.")}
    there = to_file_names(own, table)
    back = to_own_names(dict(sorted(there.tensors.items())), table)  # as safetensors orders them
    assert there.rest == {} and back.rest == {} and back.tensors.keys() == own.keys()
    assert all(torch.equal(value, back.tensors[key]) for key, value in own.items())


@pytest.mark.parametrize("name", EXPECTED)
def test_names_are_those_of_the_family(name):
    table = TABLES[name][1]
    for own, file in EXPECTED[name].items():
        value = torch.zeros(16, 2)
        assert list(to_file_names({own: value}, table).tensors) == [file]
        assert list(to_own_names({file: value}, table).tensors) == [own]


@pytest.mark.parametrize("table", [OPENMMLAB_MASK_RCNN, DETECTRON2_MASK_RCNN], ids=["OpenMMLab", "detectron2"])
def test_background_comes_first_here_and_last_there(table):
    predictor = "roi_heads.box_predictor"
    own = {
        f"{predictor}.cls_score.bias": torch.tensor([9.0, 1, 2, 3]),
        f"{predictor}.bbox_pred.bias": torch.cat([torch.zeros(4), torch.arange(1.0, 13)]),
        "roi_heads.mask_predictor.mask_fcn_logits.bias": torch.tensor([0.0, 1, 2, 3]),
    }
    there = to_file_names(own, table)
    assert [value.tolist() for value in there.tensors.values()] == [[1, 2, 3, 9], list(range(1, 13)), [1, 2, 3]]
    assert len(there.changes) == 3
    back = to_own_names(there.tensors, table).tensors
    assert all(torch.equal(value, back[key]) for key, value in own.items())


def test_kept_rows_of_background_alone_are_no_rows_of_classes():
    lonely = {"roi_head.bbox_head.fc_reg.background_weight": torch.ones(4, 8)}
    assert to_own_names(lonely, OPENMMLAB_MASK_RCNN).rest == lonely


def test_torchvision_names_from_before_its_convolutions_were_wrapped_are_read():
    old = {
        "backbone.fpn.inner_blocks.0.weight": "fpn.pyramid.inner_blocks.0.0.weight",
        "backbone.fpn.layer_blocks.3.bias": "fpn.pyramid.layer_blocks.3.0.bias",
        "rpn.head.conv.weight": "rpn.head.conv.0.0.weight",
        "roi_heads.mask_head.mask_fcn1.weight": "roi_heads.mask_head.0.0.weight",
        "roi_heads.mask_head.mask_fcn4.bias": "roi_heads.mask_head.3.0.bias",
    }
    found = to_own_names({name: torch.ones(1) for name in old}, TORCHVISION_MASK_RCNN)
    assert found.origins == {own: name for name, own in old.items()} and not found.rest


def test_every_table_is_tested():
    public = {value for name, value in vars(head_names).items() if name.isupper() and not name.startswith("_")}
    assert public == {table for _, table in TABLES.values()}
