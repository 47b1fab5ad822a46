import math
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.image_list import ImageList

from swin_dense.box_masks import BoxMasks
from swin_dense.config import SwinConfig
from swin_dense.errors import ConfigError, DataError
from swin_dense.heads import roi_heads, rpn
from swin_dense.heads.cascade_mask_rcnn import cascade_mask_rcnn
from swin_dense.heads.mask_rcnn import mask_rcnn, pad_to_batch
from swin_dense.swin import SwinTransformer
from swin_dense.training.loss_terms import means

TINY = SwinConfig(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0)
WIDTHS = {"fpn_channels": 8, "box_head_channels": 16, "mask_head_channels": 8}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def detector_of(num_classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    detector = mask_rcnn(TINY, num_classes, **{**WIDTHS, **changes})
    for name, parameter in detector.named_parameters():  # outputs that differ from image to image
        if "predictor" in name or "cls_logits" in name:
            parameter.data = torch.randn(parameter.shape) * (0.02 if "bbox_pred" in name else 0.3)
    return detector


def image_of(height, width, seed=0, dtype=torch.float32):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def target_of(size_hw, boxes=((5.0, 4.0, 30.0, 29.0), (11.0, 7.0, 40.0, 23.0)), labels=None):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 3 if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels, "masks": masks}


SIZES_HW = [(41, 67), (64, 33)]
IMAGES = [image_of(*size_hw, seed=index) for index, size_hw in enumerate(SIZES_HW)]


# ---- Costs.


@pytest.mark.parametrize(
    ("variant", "million_parameters", "giga_multiply_adds"), [("swin_t", 47.8, 266.6), ("swin_s", 69.1, 358.6)]
)
def test_variants_cost_what_was_published(variant, million_parameters, giga_multiply_adds):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        detector = mask_rcnn(variant, num_classes=80).eval()
        levels = detector.fpn(detector.backbone(torch.empty(1, 3, 800, 1280)))
        detector.rpn.head(list(levels.values()))
        heads = detector.roi_heads
        heads.box_predictor(heads.box_head(torch.empty(1000, 256, 7, 7)))
        heads.mask_predictor(heads.mask_head(torch.empty(100, 256, 14, 14)))
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    assert parameters == pytest.approx(million_parameters * 1e6, rel=5e-3)
    assert counter.get_total_flops() / 2 == pytest.approx(giga_multiply_adds * 1e9, rel=5e-3)


# ---- Detections.


def test_detections_are_in_the_frame_and_form_that_is_promised():
    detector = detector_of().eval()
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
        assert {result[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}


def test_labels_out_are_zero_based():
    detector = detector_of().eval()
    detector.roi_heads.box_predictor.cls_score.weight.data.zero_()
    detector.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([0.0, -9.0, 5.0, -9.0])  # background first
    with torch.no_grad():
        (result,) = detector([IMAGES[0]])
    assert set(result["labels"].tolist()) == {1}


def test_batch_is_each_image_alone_where_the_padded_sizes_are_equal():
    detector = detector_of().double().eval()
    images = [image_of(41, 67, 0).double(), image_of(64, 90, 1).double(), image_of(33, 96, 2).double()]
    with torch.no_grad():
        together = detector(images)
        for image, result in zip(images, together, strict=True):
            (alone,) = detector([image])
            assert len(alone["scores"]) > 0
            assert torch.equal(alone["labels"], result["labels"])
            for name in ("boxes", "scores", "masks"):
                assert float((alone[name] - result[name]).abs().max()) < 1e-9


def test_order_of_the_batch_does_not_matter():
    detector = detector_of().double().eval()
    images = [image_of(41, 67, 0).double(), image_of(75, 33, 1).double()]
    with torch.no_grad():
        forth, back = detector(images), detector(images[::-1])[::-1]
    for one, other in zip(forth, back, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert all(torch.allclose(one[name], other[name], atol=1e-9) for name in ("boxes", "scores", "masks"))


def test_no_detections_give_empty_results():
    detector = detector_of(score_threshold=0.9999).eval()
    with torch.no_grad():
        results = detector(IMAGES)
    for result, size_hw in zip(results, SIZES_HW, strict=True):
        shapes = {name: tuple(value.shape) for name, value in result.items()}
        assert shapes == {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, *size_hw)}


def test_a_network_whose_numbers_ran_away_still_answers():
    detector = detector_of().eval()
    detector.rpn.head.bbox_pred.bias.data.fill_(1e9)  # every proposal lies outside the image
    with torch.no_grad():
        results = detector(IMAGES)
    assert [len(result["boxes"]) for result in results] == [0, 0]


def test_detect_gives_the_same_without_pasting():
    detector = detector_of().eval()
    with torch.no_grad():
        pasted, squares = detector(IMAGES), detector.detect(IMAGES)
    for one, other in zip(pasted, squares, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores"))
        assert other["masks"].shape == (len(other["boxes"]), 1, 28, 28)


@pytest.mark.parametrize("size_hw", [(1, 1), (7, 5), (3, 150)])
def test_tiny_and_narrow_images_are_detected_and_trained_on(size_hw):
    detector, image = detector_of(), image_of(*size_hw)
    with torch.no_grad():
        (result,) = detector.eval()([image])
    assert result["masks"].shape[2:] == size_hw
    target = target_of(size_hw, boxes=[(0.0, 0.0, 1.0, 1.0)])
    losses = detector.train()([image], [target])
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())


def test_images_and_targets_are_left_alone():
    detector = detector_of()
    images, targets = [image.clone() for image in IMAGES], [target_of(size_hw) for size_hw in SIZES_HW]
    targets[0]["iscrowd"] = torch.tensor([True, False])
    before = [{name: value.clone() for name, value in target.items()} for target in targets]
    detector.train()(images, targets)
    detector.eval()(images)
    assert all(torch.equal(image, other) for image, other in zip(images, IMAGES, strict=True))
    for target, copy in zip(targets, before, strict=True):
        assert target.keys() == copy.keys() and all(torch.equal(target[name], copy[name]) for name in target)


def test_maximum_of_detections_is_kept():
    with torch.no_grad():
        results = detector_of(max_detections=3).eval()(IMAGES)
    assert [len(result["boxes"]) for result in results] == [3, 3]


# ---- Training.


@pytest.mark.parametrize("style", ["published", "torchvision"])
@pytest.mark.parametrize("counts", [(2, 2), (2, 0), (0, 0)])
def test_losses_are_finite_and_reach_every_parameter(style, counts):
    detector = detector_of(style=style).train()
    targets = [
        target_of(size_hw, boxes=[(5.0, 4.0, 30.0, 29.0)] * n) for size_hw, n in zip(SIZES_HW, counts, strict=True)
    ]
    losses = detector(IMAGES, targets)
    assert set(losses) == LOSSES
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
    if not any(counts):
        assert [float(losses[name].detach()) for name in ("loss_rpn_box_reg", "loss_box_reg", "loss_mask")] == [0, 0, 0]
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_labels_in_are_zero_based():
    detector = detector_of().train()
    seen = []
    heads = detector.roi_heads
    heads.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[3][0]["labels"].tolist()))
    detector([IMAGES[0]], [target_of(SIZES_HW[0], labels=[0, 2])])
    assert seen == [[1, 3]]


def test_box_masks_train_as_full_masks_do():
    targets = [target_of(size_hw) for size_hw in SIZES_HW]
    packed = [{**target, "masks": BoxMasks.from_full(target["masks"])} for target in targets]
    results = []
    for form in (targets, packed):
        detector = detector_of().train()
        torch.manual_seed(3)
        results.append(detector(IMAGES, form))
    assert all(torch.equal(results[0][name], results[1][name]) for name in LOSSES)


def test_targets_that_do_not_fit_are_refused():
    detector = detector_of().train()
    with pytest.raises(DataError, match=r"target 1: labels must be 0 to 2 .*, got 0 to 3"):
        detector([IMAGES[0]] * 2, [target_of(SIZES_HW[0]), target_of(SIZES_HW[0], labels=[0, 3])])


# ---- Detections and losses from one pass.

KINDS = pytest.mark.parametrize("kind", ["published", "torchvision", "cascade"])


def either_detector(kind, drop_path_rate=0.0, **changes):
    config = replace(TINY, drop_path_rate=drop_path_rate)
    torch.manual_seed(0)
    if kind == "cascade":
        detector = cascade_mask_rcnn(config, 3, **WIDTHS, **changes)
    else:
        detector = mask_rcnn(config, 3, style=kind, **WIDTHS, **changes)
    for name, parameter in detector.named_parameters():
        if "predictor" in name or "cls_logits" in name:
            parameter.data = torch.randn(parameter.shape) * (0.02 if "bbox_pred" in name else 0.3)
    return detector.double().eval()


def sample_everything(detector):
    heads = detector.roi_heads
    samplers = [stage.sample.draw for stage in heads.stages] if hasattr(heads, "stages") else [heads.sample.draw]
    for sampler in [detector.rpn.fg_bg_sampler, *samplers]:
        sampler.batch_size_per_image = 10**9


@KINDS
def test_detections_are_the_same_bit_for_bit_with_losses(kind):
    detector = either_detector(kind, drop_path_rate=0.5, max_proposals=40)
    images = [image.double() for image in IMAGES]
    passes = []
    detector.backbone.register_forward_hook(lambda *_: passes.append("backbone"))
    detector.rpn.head.register_forward_hook(lambda *_: passes.append("rpn"))
    with torch.no_grad():
        plain = detector.detect(images)
        passes.clear()
        results, losses = detector.detect_with_losses(images, [target_of(size_hw) for size_hw in SIZES_HW])
    assert passes == ["backbone", "rpn"] and not any(module.training for module in detector.modules())
    assert all(len(result["scores"]) > 0 for result in results)
    for one, other in zip(plain, results, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(float(term.mean) > 0 and term.count > 0 for term in losses.values())


@pytest.mark.parametrize("kind", ["published", "cascade"])
def test_losses_in_evaluation_are_those_of_training_where_nothing_is_random(kind):
    detector = either_detector(kind, max_proposals=40)  # few, so that the numbers of training and evaluation differ
    sample_everything(detector)
    images, targets = [image.double() for image in IMAGES], [target_of(size_hw) for size_hw in SIZES_HW]
    with torch.no_grad():
        _, found = detector.detect_with_losses(images, targets)
        detector.train()
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        wanted = detector.loss_terms(images, targets)
        evaluated = detector.rpn.eval()(*detector.pyramid(images))[0]
    assert list(found) == list(wanted)
    for name, term in wanted.items():
        assert found[name].count == term.count
        assert float(found[name].mean) == pytest.approx(float(term.mean), rel=1e-12)
    assert found["loss_classifier" + "_0" * (kind == "cascade")].count > sum(map(len, evaluated)) + 4


@KINDS
def test_losses_in_evaluation_are_repeated_and_leave_the_generators_alone(kind, monkeypatch):
    detector = either_detector(kind, drop_path_rate=0.5, samples_per_image=8)
    images, targets = [image.double() for image in IMAGES], [target_of(size_hw) for size_hw in SIZES_HW]

    def losses_after(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return means(detector.detect_with_losses(images, targets)[1])

    first, again = losses_after(1), losses_after(2)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(2).get_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(sys.modules[type(detector).__module__], "repeated_random_state", nullcontext)
    first, again = losses_after(1), losses_after(2)
    assert not all(torch.equal(first[name], again[name]) for name in first)


@KINDS
def test_an_image_without_objects_has_losses_in_evaluation(kind):
    detector = either_detector(kind)
    with torch.inference_mode():
        _, losses = detector.detect_with_losses([IMAGES[0].double()], [target_of(SIZES_HW[0], boxes=())])
    assert all(math.isfinite(float(term.mean)) for term in losses.values())
    assert {int(term.count) for name, term in losses.items() if "mask" in name} == {0}


def test_targets_of_validation_images_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="2 images came with 1 targets"):
        detector_of().eval().detect_with_losses(IMAGES, [target_of(SIZES_HW[0])])


# ---- Regions to ignore.

DETECTORS = [mask_rcnn, cascade_mask_rcnn]
OBJECT = (5.0, 4.0, 30.0, 29.0)


def losses_of(build, target, **settings):
    torch.manual_seed(0)
    detector = build(TINY, 3, **{**WIDTHS, **settings}).train()
    torch.manual_seed(3)
    return detector([image_of(128, 160)], [target])


def with_region(*boxes, region):
    """The last box is a region to ignore."""
    target = target_of((128, 160), boxes=[*boxes, region])
    return {**target, "iscrowd": torch.tensor([False] * len(boxes) + [True])}


@pytest.mark.parametrize("build", DETECTORS)
def test_published_models_learn_regions_to_ignore_as_background(build):
    absent = losses_of(build, target_of((128, 160), boxes=[OBJECT]))
    crowd = with_region(OBJECT, region=(40.0, 20.0, 150.0, 120.0))
    published = losses_of(build, crowd, ignore_overlap=None)
    assert all(torch.equal(absent[name], published[name]) for name in absent)
    ours = losses_of(build, crowd)
    assert not torch.equal(ours["loss_objectness"], absent["loss_objectness"])


@pytest.mark.parametrize("build", DETECTORS)
def test_a_region_that_no_box_reaches_changes_nothing(build):
    absent = losses_of(build, target_of((128, 160), boxes=[OBJECT]))
    away = losses_of(build, with_region(OBJECT, region=(9000.0, 9000.0, 9999.0, 9999.0)))
    assert all(torch.equal(absent[name], away[name]) for name in absent)


@pytest.mark.parametrize("build", DETECTORS)
def test_an_image_of_which_all_is_ignored_teaches_nothing(build):
    detector = build(TINY, 3, **WIDTHS).train()
    losses = detector([image_of(128, 160)], [with_region(region=(-600.0, -600.0, 800.0, 800.0))])
    assert {name: float(loss.detach()) for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    sum(losses.values()).backward()
    # Each has a gradient, if zero: processes that train together wait for those of all.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in detector.parameters())


@pytest.mark.parametrize("build", DETECTORS)
def test_nothing_in_an_ignored_region_is_a_negative(build):
    region = (40.0, 20.0, 150.0, 120.0)
    torch.manual_seed(0)
    detector = build(TINY, 3, **WIDTHS).train()
    anchor_labels, anchors, samples = [], [], []
    stages = getattr(detector.roi_heads, "stages", [detector.roi_heads])
    for stage in stages:
        object.__setattr__(stage, "sample", Recorder(stage.sample, samples))
    assign = detector.rpn.assign_targets_to_anchors

    def recorded(all_anchors, targets):
        labels, boxes = assign(all_anchors, targets)
        anchors.extend(all_anchors)
        anchor_labels.extend(labels)
        return labels, boxes

    detector.rpn.assign_targets_to_anchors = recorded
    losses = detector([image_of(128, 160)], [with_region(region=region)])
    assert all(float(loss.detach()) == 0 for name, loss in losses.items() if "box_reg" in name or "mask" in name)
    assert len(samples) == len(stages)
    for boxes, labels in [*zip(anchors, anchor_labels, strict=True), *((s.boxes, s.labels) for s in samples)]:
        inside = share_inside(boxes, region) >= 0.5
        assert bool((labels[inside] < 0).all()) and bool((labels == 0).any()) and len(boxes) > 0
    assert bool((share_inside(anchors[0], region) >= 0.5).any())


class Recorder:
    def __init__(self, sample, samples):
        self.sample, self.samples = sample, samples

    def __call__(self, proposals, targets):
        samples = self.sample(proposals, targets)
        self.samples.extend(samples.trimmed()[0])
        return samples

    def __getattr__(self, name):
        return getattr(self.sample, name)


def share_inside(boxes, region):
    clipped = torch.cat(
        (boxes[:, :2].clamp(min=torch.tensor(region[:2])), boxes[:, 2:].clamp(max=torch.tensor(region[2:]))), 1
    )
    width, height = (clipped[:, 2:] - clipped[:, :2]).clamp(min=0).unbind(dim=1)
    return width * height / ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def test_padding_of_the_batch_gives_no_negative_anchors():
    detector = detector_of().train()
    labels = []
    sampler = detector.rpn.fg_bg_sampler
    detector.rpn.fg_bg_sampler = lambda per_image: labels.extend(per_image) or sampler(per_image)
    detector([image_of(31, 29), image_of(128, 96)], [target_of((31, 29), boxes=()), target_of((128, 96), boxes=())])
    small, large = (int((image_labels >= 0).sum()) for image_labels in labels)
    assert large == len(labels[1])
    assert small == 3 * (8 * 8 + 4 * 4 + 2 * 2 + 1 + 1)  # 32 x 32 pixels


class Waits(TorchDispatchMode):
    """Lists the operations for whose results a host waits for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "repeat_interleave", "bincount")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in self.NAMES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_no_part_of_training_waits_for_a_gpu(monkeypatch):
    """Pooling and the masks of targets, which have kernels of their own on a GPU, are left out."""
    for module in (rpn, roi_heads):
        monkeypatch.setattr(module, "counts_are_known", lambda values: False)
    monkeypatch.setattr(
        roi_heads,
        "batch_mask_targets",
        lambda masks, boxes, matched, size: torch.zeros(sum(map(len, boxes)), size, size),
    )
    detector = detector_of().train()
    targets = detector._training_targets(IMAGES, [target_of(size_hw) for size_hw in SIZES_HW])
    for pool in (detector.roi_heads.box_roi_pool, detector.roi_heads.mask_roi_pool):
        pool.forward = lambda levels, boxes, sizes, side=pool.output_size: (
            levels["p2"].mean().expand(sum(map(len, boxes)), levels["p2"].shape[1], *side)
        )
    with Waits() as waits:
        batch, levels = detector.pyramid(IMAGES)
        proposals, terms = detector.rpn(batch, levels, targets)
        terms |= detector.roi_heads(levels, proposals, batch.image_sizes, targets)[1]
        sum(means(terms).values()).backward()
    assert waits.names == []
    with Waits() as waits:
        detector.eval().detect(IMAGES)
    assert waits.names != []


def test_bfloat16_autocast_trains_and_detects_at_full_precision():
    detector, targets = detector_of(), [target_of(size_hw) for size_hw in SIZES_HW]
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(IMAGES, targets)
        with torch.no_grad():
            results = detector.eval()(IMAGES)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())
    for result in results:
        assert {result[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}


def test_training_reduces_the_losses_of_one_batch():
    detector, targets = detector_of().train(), [target_of(size_hw) for size_hw in SIZES_HW]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    totals = []
    for _ in range(8):
        total = sum(detector(IMAGES, targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.7 * totals[0]


# ---- The style of torchvision.


class Pyramid(nn.Module):
    """Backbone and FPN as torchvision's detectors want them."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.fpn, self.out_channels = detector.backbone, detector.fpn, WIDTHS["fpn_channels"]

    def forward(self, images):
        return self.fpn(self.backbone(images))


def torchvision_twin(detector, min_size, max_size):
    rpn, heads = detector.rpn, detector.roi_heads
    return TorchvisionMaskRCNN(
        Pyramid(detector),
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=rpn.anchor_generator,
        rpn_head=rpn.head,
        box_roi_pool=heads.box_roi_pool,
        box_head=heads.box_head,
        box_predictor=heads.box_predictor,
        mask_roi_pool=heads.mask_roi_pool,
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
    )


def test_torchvision_style_is_torchvisions_network():
    detector = detector_of(style="torchvision").eval()
    twin = torchvision_twin(detector, min_size=64, max_size=96).eval()
    images = [image_of(64, 96, 0), image_of(96, 64, 1)]  # sizes that torchvision leaves as they are
    with torch.no_grad():
        wanted, results = twin(images), detector(images)
    for result, other in zip(results, wanted, strict=True):
        assert len(result["labels"]) > 10
        assert torch.equal(result["labels"] + 1, other["labels"])
        for name in ("boxes", "scores", "masks"):
            assert torch.allclose(result[name], other[name], atol=1e-5)


def test_torchvision_style_has_torchvisions_losses():
    detector = detector_of(style="torchvision").train()
    twin = torchvision_twin(detector, min_size=64, max_size=96).train()
    images, targets = [image_of(64, 96)], [target_of((64, 96))]

    def same_samples(module, arguments):
        torch.manual_seed(1)

    detector.backbone.register_forward_pre_hook(same_samples)  # the backbone of both networks
    losses = detector(images, targets)
    wanted = twin(images, [{**targets[0], "labels": targets[0]["labels"] + 1}])
    assert set(losses) == set(wanted)
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(float(wanted[name].detach()), rel=1e-4)


def test_styles_share_their_weights_and_differ_in_their_answers():
    published, torchvision = detector_of().eval(), detector_of(style="torchvision").eval()
    torchvision.load_state_dict(published.state_dict())
    with torch.no_grad():
        one, other = published([image_of(64, 96)]), torchvision([image_of(64, 96)])
    assert one[0]["boxes"].shape != other[0]["boxes"].shape or not torch.equal(one[0]["boxes"], other[0]["boxes"])


# ---- Batches and wrong use.


def test_pad_to_batch_pads_bottom_and_right_to_a_multiple():
    images = [torch.rand(2, 5, 7) + 1, torch.rand(2, 9, 3) + 1]
    batch = pad_to_batch(images, 4)
    assert isinstance(batch, ImageList)
    assert batch.tensors.shape == (2, 2, 12, 8) and batch.image_sizes == [(5, 7), (9, 3)]
    for image, padded in zip(images, batch.tensors, strict=True):
        assert torch.equal(padded[:, : image.shape[1], : image.shape[2]], image)
        assert float(padded.sum()) == pytest.approx(float(image.sum()), rel=1e-5)


def test_padding_is_zero_after_normalisation():
    detector = detector_of().eval()
    seen = []
    detector.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        detector([image_of(41, 67)])
    assert seen[0].shape == (1, 3, 64, 96)
    assert not seen[0][:, :, 41:].any() and not seen[0][:, :, :, 67:].any()


def test_wrong_calls_are_refused():
    detector = detector_of()
    with pytest.raises(ConfigError, match=r"training needs targets: call model\(images, targets\), or model\.eval\(\)"):
        detector.train()(IMAGES)
    with pytest.raises(DataError, match="2 images came with 1 targets; each image needs one"):
        detector(IMAGES, [target_of(SIZES_HW[0])])
    with pytest.raises(ConfigError, match="needs at least one image, got an empty list"):
        detector.eval()([])
    for images in ([torch.zeros(3, 5, 7, dtype=torch.uint8)], [torch.zeros(5, 7)], [torch.zeros(1, 3, 5, 7)]):
        with pytest.raises(ConfigError, match=r"images must be \((3|channels), H, W\)"):
            detector(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, r"num_classes must be 1 or more, got 0"),
        ({"style": "mmdet"}, "style must be 'published' or 'torchvision', got 'mmdet'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        mask_rcnn(TINY, **{"num_classes": 3, **WIDTHS, **changes})


def test_other_channels_and_a_ready_backbone_work():
    backbone = SwinTransformer(SwinConfig(embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, in_channels=5))
    detector = mask_rcnn(backbone, 2, **WIDTHS, image_mean=[0.5] * 5, image_std=[0.2] * 5).eval()
    assert detector.backbone is backbone
    with torch.no_grad():
        (result,) = detector([torch.rand(5, 37, 41)])
    assert result["masks"].shape[2:] == (37, 41)


def test_anchor_scale_sets_the_side_of_the_anchors():
    detector = detector_of(anchor_scale=2.0)
    x1, _, x2, _ = detector.rpn.anchor_generator.cell_anchors(4)[1]
    assert x2 - x1 == 8.0


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector_of().train()(IMAGES, [target_of(size_hw) for size_hw in SIZES_HW])
