import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError, DataError
from swin_dense.heads import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import MaskRCNN, mask_rcnn
from swin_dense.swin import SwinTransformer

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0)
WIDTHS = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8}
LOSSES = {"loss_objectness", "loss_rpn_box_reg"}
LOSSES |= {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg", "mask") for stage in range(3)}
SIZES_HW = [(41, 67), (64, 33)]


def detector_of(num_classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    detector = cascade_mask_rcnn(TINY, num_classes, **{**WIDTHS, **changes})
    for name, parameter in detector.named_parameters():  # outputs that differ from image to image
        if "predictor" in name or "cls_logits" in name:
            parameter.data = torch.randn(parameter.shape) * (0.02 if "bbox_pred" in name else 0.3)
    return detector


def image_of(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def target_of(size_hw, boxes=((5.0, 4.0, 30.0, 29.0), (11.0, 7.0, 33.0, 23.0)), labels=None):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 3 if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels, "masks": masks}


IMAGES = [image_of(*size_hw, seed=index) for index, size_hw in enumerate(SIZES_HW)]
TARGETS = [target_of(size_hw) for size_hw in SIZES_HW]


@pytest.mark.parametrize(
    ("variant", "million_parameters", "giga_multiply_adds"),
    [("swin_t", 86, 745), ("swin_s", 107, 838), ("swin_b", 145, 982)],
)
def test_variants_cost_what_was_published(variant, million_parameters, giga_multiply_adds):
    # The official count: 1000 proposals through the three box heads, 100 of them through the three mask heads.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        detector = cascade_mask_rcnn(variant, num_classes=80).eval()
        levels = detector.fpn(detector.backbone(torch.empty(1, 3, 800, 1280)))
        detector.rpn.head(list(levels.values()))
        heads = detector.roi_heads
        for stage in range(3):
            heads.box_predictor[stage](heads.box_head[stage](torch.empty(1000, 256, 7, 7)))
            heads.mask_predictor[stage](heads.mask_head[stage](torch.empty(100, 256, 14, 14)))
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    assert parameters == pytest.approx(million_parameters * 1e6, rel=5e-3)
    assert counter.get_total_flops() / 2 == pytest.approx(giga_multiply_adds * 1e9, rel=5e-3)


def test_it_is_mask_rcnn_with_other_roi_heads():
    cascade, plain = detector_of(), mask_rcnn(TINY, 3, **WIDTHS)
    assert type(cascade) is MaskRCNN
    names = [{name for name in model.state_dict() if not name.startswith("roi_heads.")} for model in (cascade, plain)]
    assert names[0] == names[1]


@pytest.mark.parametrize("shared", [False, True])
def test_detections_are_in_the_frame_and_form_that_is_promised(shared):
    detector = detector_of(shared_regression=shared).eval()
    with torch.no_grad():
        results = detector(IMAGES)
    for result, (height, width) in zip(results, SIZES_HW, strict=True):
        count = len(result["scores"])
        assert 0 < count <= 100
        assert result["boxes"].shape == (count, 4) and result["masks"].shape == (count, 1, height, width)
        assert result["labels"].dtype == torch.int64 and {0, 1, 2} >= set(result["labels"].tolist())
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"][:, 0::2] <= width).all() and (result["boxes"][:, 1::2] <= height).all()
        assert (result["scores"].diff() <= 0).all() and (result["scores"] > 0.05).all()
        assert (result["masks"] >= 0).all() and (result["masks"] <= 1).all()


def test_labels_out_are_zero_based():
    detector = detector_of().eval()
    for predictor in detector.roi_heads.box_predictor:
        predictor.cls_score.weight.data.zero_()
        predictor.cls_score.bias.data = torch.tensor([0.0, -9.0, 5.0, -9.0])  # background first
    with torch.no_grad():
        (result,) = detector([IMAGES[0]])
    assert set(result["labels"].tolist()) == {1}


def test_batch_is_each_image_alone_where_the_padded_sizes_are_equal():
    detector = detector_of().double().eval()
    images = [image_of(*size_hw, seed).double() for seed, size_hw in enumerate([(41, 67), (33, 96)])]
    with torch.no_grad():
        together = detector(images)
        for image, result in zip(images, together, strict=True):
            (alone,) = detector([image])
            assert len(alone["scores"]) > 0 and torch.equal(alone["labels"], result["labels"])
            assert all(torch.allclose(alone[name], result[name], atol=1e-9) for name in ("boxes", "scores", "masks"))


@pytest.mark.parametrize("size_hw", [(1, 1), (7, 5), (3, 150)])
def test_tiny_and_narrow_images_are_detected_and_trained_on(size_hw):
    detector, image = detector_of(), image_of(*size_hw)
    with torch.no_grad():
        (result,) = detector.eval()([image])
    assert result["masks"].shape[2:] == size_hw
    losses = detector.train()([image], [target_of(size_hw, boxes=[(0.0, 0.0, 1.0, 1.0)])])
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())


@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (0, 0)])
def test_losses_are_finite_and_reach_every_parameter(counts):
    detector = detector_of().train()
    targets = [
        target_of(size_hw, boxes=[(5.0, 4.0, 30.0, 29.0)] * n) for size_hw, n in zip(SIZES_HW, counts, strict=True)
    ]
    losses = detector(IMAGES, targets)
    assert set(losses) == LOSSES
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_anchors_that_cross_the_border_of_the_image_itself_are_not_trained_on():
    detector, labels, anchors = detector_of(anchor_scale=4.0).train(), [], []
    sampler = detector.rpn.fg_bg_sampler
    detector.rpn.fg_bg_sampler = lambda per_image: labels.extend(per_image) or sampler(per_image)
    detector.rpn.anchor_generator.register_forward_hook(lambda module, arguments, output: anchors.extend(output))
    detector(IMAGES, TARGETS)
    for image_labels, image_anchors, (height, width) in zip(labels, anchors, SIZES_HW, strict=True):
        trained_on = image_anchors[image_labels >= 0]
        assert len(trained_on) > 0 and (trained_on >= 0).all()
        assert (trained_on[:, 2] < width).all() and (trained_on[:, 3] < height).all()


def test_training_looks_at_twice_the_proposals():
    detector, seen = detector_of(max_proposals=20, anchor_scale=2.0), []
    detector.roi_heads.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[1][0])))
    detector.train()([IMAGES[0]], [TARGETS[0]])
    with torch.no_grad():
        detector.eval()([IMAGES[0]])
    assert 20 < seen[0] <= 40 and seen[1] <= 20


def test_training_reduces_the_losses_of_one_batch():
    detector = detector_of().train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    totals = []
    for _ in range(5):
        total = sum(detector(IMAGES, TARGETS).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.8 * totals[0]


def test_bfloat16_autocast_trains_and_detects_at_full_precision():
    detector = detector_of()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(IMAGES, TARGETS)
        with torch.no_grad():
            results = detector.eval()(IMAGES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())
    for result in results:
        assert {result[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}


def test_batch_norms_can_be_synchronised_without_new_names():
    detector = detector_of()
    names = list(detector.state_dict())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    norms = [module for module in synchronised.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == 3 * 4 and list(synchronised.state_dict()) == names


@pytest.mark.parametrize(
    "changes", [{}, {"shared_regression": True, "anchor_scale": 4.0, "image_std": (0.1, 0.2, 0.3), "max_proposals": 70}]
)
def test_the_architecture_builds_the_same_network_again(changes):
    detector = detector_of(**changes).eval()
    architecture = dict(detector.architecture)
    assert architecture.pop("head") == "cascade_mask_rcnn"
    again = cascade_mask_rcnn(SwinConfig.from_dict(architecture.pop("backbone")), **architecture).eval()
    assert again.architecture == detector.architecture
    again.load_state_dict(detector.state_dict())
    with torch.no_grad():
        for one, other in zip(detector(IMAGES), again(IMAGES), strict=True):
            assert len(one["labels"]) > 0 and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["num_classes", "box_head_channels", "max_proposals"])
def test_wrong_settings_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be 1 or more, got 0"):
        cascade_mask_rcnn(TINY, **{"num_classes": 3, **WIDTHS, name: 0})


def test_wrong_targets_are_refused():
    with pytest.raises(DataError, match=r"target 1: labels must be 0 to 2 .*, got 3 to 3"):
        detector_of().train()(IMAGES, [TARGETS[0], target_of(SIZES_HW[1], labels=[3, 3])])


def test_other_channels_and_a_ready_backbone_work():
    backbone = SwinTransformer(SwinConfig(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, in_channels=5))
    detector = cascade_mask_rcnn(backbone, 2, **WIDTHS, image_mean=[0.5] * 5, image_std=[0.2] * 5).eval()
    assert detector.backbone is backbone
    with torch.no_grad():
        (result,) = detector([torch.rand(5, 37, 41)])
    assert result["masks"].shape[2:] == (37, 41)
