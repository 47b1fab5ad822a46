import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import batched_nms, box_iou

from swin_dense.box_masks import BoxMasks
from swin_dense.features import FeatureSpec
from swin_dense.heads import roi_heads
from swin_dense.heads.box_batches import EMPTY_BOX
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.mask_targets import mask_targets
from swin_dense.heads.roi_heads import (
    BoxPredictor,
    DetectionSelector,
    MaskPredictor,
    published_roi_heads,
)
from swin_dense.training.loss_terms import means

SPECS = {f"p{k}": FeatureSpec(4, 2**k) for k in (2, 3, 4, 5)}
SIZE_HW = (96, 128)
SETTINGS = DetectorSettings(
    num_classes=3,
    fpn_channels=4,
    box_head_channels=16,
    mask_head_channels=6,
    score_threshold=0.05,
    max_detections=100,
    anchor_scale=8.0,
    max_proposals=1000,
    samples_per_image=512,
    ignore_overlap=0.5,
    image_mean=None,
    image_std=None,
)


def heads_of(build=published_roi_heads, **changes):
    torch.manual_seed(0)
    return build(SPECS, replace(SETTINGS, **changes))


def lively(heads):
    for name, parameter in heads.named_parameters():
        if "predictor" in name:
            parameter.data = torch.randn(parameter.shape) * 0.5
    return heads


def random_levels(num_images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(num_images, 4, SIZE_HW[0] // spec.stride, SIZE_HW[1] // spec.stride, generator=generator)
        for name, spec in SPECS.items()
    }


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator) * 60 + 3), dim=1)


def target_of(count, seed=5):
    return {
        "boxes": random_boxes(count, seed),
        "labels": torch.arange(count) % 3 + 1,
        "masks": BoxMasks.from_full(torch.rand(count, *SIZE_HW, generator=torch.Generator().manual_seed(seed)) > 0.5),
        "ignored_boxes": torch.zeros(0, 4),
    }


def slow_detections(boxes, probabilities, threshold, nms, most):
    rows = [
        (float(probabilities[row, label]), row, label)
        for row in range(len(boxes))
        for label in range(1, probabilities.shape[1])
        if probabilities[row, label] > threshold
    ]
    kept = []
    for score, row, label in sorted(rows, key=lambda entry: -entry[0]):
        box = boxes[row, label].clone()
        box[0::2] = box[0::2].clamp(0, SIZE_HW[1])
        box[1::2] = box[1::2].clamp(0, SIZE_HW[0])
        if all(label != other or float(box_iou(box[None], seen[None])) <= nms for seen, _, other in kept):
            kept.append((box, score, label))
    return kept[:most]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("threshold", "most"), [(0.05, 100), (0.4, 100), (0.05, 7)])
def test_detections_are_every_class_of_every_box_after_suppression(threshold, most, shared):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(28, 4, generator=generator) * 2
    groups = torch.stack([random_boxes(28, seed=seed) for seed in range(4)], dim=1) - 5  # (28, 4 classes, 4)
    groups = groups[:, :1] if shared else groups
    select = DetectionSelector(threshold, 0.5, most)
    boxes, scores, labels = select(groups.flatten(1), logits, [23, 0, 5], [SIZE_HW] * 3)
    of_class = groups.expand(28, 4, 4)
    probabilities = logits.softmax(dim=1)
    assert len(boxes[1]) == 0 and boxes[1].shape == (0, 4)
    for image, rows in ((0, slice(0, 23)), (2, slice(23, 28))):
        wanted = slow_detections(of_class[rows], probabilities[rows], threshold, 0.5, most)
        assert labels[image].tolist() == [label for _, _, label in wanted]
        assert scores[image].tolist() == pytest.approx([score for _, score, _ in wanted])
        assert torch.allclose(boxes[image], torch.stack([box for box, _, _ in wanted]), atol=1e-4)


def test_detections_are_selected_among_the_decoded_boxes():
    heads = lively(heads_of()).eval()
    levels, proposals = random_levels(2), [random_boxes(9), random_boxes(4, seed=2)]
    with torch.no_grad():
        detections, _ = heads(levels, proposals, [SIZE_HW] * 2)
        logits, codes = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, proposals, [SIZE_HW] * 2)))
        decoded = heads.box_coder.decode(codes, proposals)
    for result, rows in zip(detections, (slice(0, 9), slice(9, 13)), strict=True):
        wanted = slow_detections(decoded[rows], logits[rows].softmax(dim=1), 0.05, 0.5, 100)
        assert len(wanted) > 0 and result["labels"].tolist() == [label for _, _, label in wanted]
        assert torch.allclose(result["boxes"], torch.stack([box for box, _, _ in wanted]), atol=1e-4)


def test_detections_of_no_proposals_at_all_are_empty():
    heads = lively(heads_of()).eval()
    with torch.no_grad():
        detections, losses = heads(random_levels(2), [torch.zeros(0, 4)] * 2, [SIZE_HW] * 2)
    assert losses == {} and len(detections) == 2
    for result in detections:
        shapes = {name: tuple(value.shape) for name, value in result.items()}
        assert shapes == {"boxes": (0, 4), "labels": (0,), "scores": (0,), "masks": (0, 1, 28, 28)}


def test_detections_carry_the_mask_of_their_class():
    heads = lively(heads_of()).eval()
    levels, proposals = random_levels(2), [random_boxes(9), random_boxes(4, seed=2)]
    with torch.no_grad():
        detections, _ = heads(levels, proposals, [SIZE_HW] * 2)
        for index, result in enumerate(detections):
            assert len(result["labels"]) > 0
            boxes = [result["boxes"] if image == index else torch.zeros(0, 4) for image in range(2)]
            logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, boxes, [SIZE_HW] * 2)))
            wanted = logits.sigmoid()[torch.arange(len(logits)), result["labels"]]
            assert torch.allclose(result["masks"][:, 0], wanted, atol=1e-6)
            assert (result["scores"].diff() <= 0).all()


def test_training_samples_are_the_published_ones():
    sample = heads_of(samples_per_image=512).sample
    assert (sample.draw.batch_size_per_image, sample.draw.positive_fraction) == (512, 0.25)
    matcher = sample.matcher
    assert (matcher.positive_iou, matcher.negative_iou, matcher.minimum_iou) == (0.5, 0.5, 0.5)
    assert heads_of(samples_per_image=16).sample.draw.batch_size_per_image == 16


def test_losses_follow_from_the_samples():
    heads = lively(heads_of(samples_per_image=10**6)).double().train()  # no limit: nothing is left to chance
    levels = {name: level.double() for name, level in random_levels(2).items()}
    targets = [target_of(3, seed=3), target_of(2, seed=2)]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    near = targets[0]["boxes"] + torch.tensor([1.0, -1, 2, 0.5])
    proposals = [torch.cat((random_boxes(7).double(), near)), random_boxes(5, seed=1).double()]
    with torch.no_grad():
        losses = means(heads(levels, proposals, [SIZE_HW] * 2, targets)[1])
        entropy = distance = mask_entropy = count = objects = 0.0
        for image, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            for box in torch.cat((boxes, target["boxes"])):
                alone = [box[None] if index == image else box.new_zeros(0, 4) for index in range(2)]
                logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(levels, alone, [])))
                iou, matched = box_iou(box[None], target["boxes"])[0].max(dim=0)
                label = int(target["labels"][matched]) if iou >= 0.5 else 0
                entropy -= float(logits.log_softmax(dim=1)[0, label])
                count += 1
                if label:
                    codes = heads.box_coder.encode_single(target["boxes"][matched][None], box[None])
                    distance += float((deltas[0, 4 * label : 4 * label + 4] - codes).abs().sum())
                    masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, alone, [])))
                    wanted = mask_targets(target["masks"], box[None], matched[None], 28)
                    mask_entropy += float(binary_cross_entropy_with_logits(masks[0, label], wanted[0]))
                    objects += 1
    assert objects > 5 and count == 20
    assert float(losses["loss_classifier"]) == pytest.approx(entropy / count)
    assert float(losses["loss_box_reg"]) == pytest.approx(distance / count)
    assert float(losses["loss_mask"]) == pytest.approx(mask_entropy / objects)


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)])
def test_losses_with_empty_places_are_those_without(counts, monkeypatch):
    heads = lively(heads_of(samples_per_image=10**6)).double().train()  # no limit: nothing is left to chance
    targets = [target_of(count, seed=count + 1) for count in counts]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    near = torch.cat([target["boxes"] for target in targets]) + torch.tensor([1.0, -1, 2, 0.5])
    proposals = [torch.cat((random_boxes(11).double(), near)), random_boxes(5, seed=1).double()]
    empty = torch.tensor(EMPTY_BOX).expand(3, 4)
    results = []
    for is_known, boxes in ((True, proposals), (False, [torch.cat((image, empty)) for image in proposals])):
        monkeypatch.setattr(roi_heads, "counts_are_known", lambda values, is_known=is_known: is_known)
        levels = {name: level.double().requires_grad_() for name, level in random_levels(2).items()}
        terms = heads(levels, boxes, [SIZE_HW] * 2, targets)[1]
        heads.zero_grad()
        sum(means(terms).values()).backward()
        gradients = {name: parameter.grad for name, parameter in heads.named_parameters()}
        gradients |= {name: level.grad for name, level in levels.items()}
        results.append((means(terms), {name: int(term.count) for name, term in terms.items()}, gradients))
    (losses, counted, gradients), (other_losses, other_counted, other_gradients) = results
    assert counted == other_counted and counted["loss_classifier"] == sum(map(len, proposals)) + sum(counts)
    for name, value in {**losses, **gradients}.items():
        assert torch.allclose(value, {**other_losses, **other_gradients}[name], rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)])
def test_losses_are_finite_and_reach_every_parameter(counts):
    heads = heads_of().train()
    targets = [target_of(count, seed=count) for count in counts]
    detections, terms = heads(random_levels(2), [random_boxes(31), random_boxes(17)], [SIZE_HW] * 2, targets)
    losses = means(terms)
    assert detections == [] and set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask"}
    for name, loss in losses.items():
        assert math.isfinite(float(loss.detach()))
        assert (float(loss.detach()) == 0) == (sum(counts) == 0 and name != "loss_classifier")
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_losses_without_proposals_and_objects_are_zero_with_gradients():
    heads = heads_of().train()
    losses = means(heads(random_levels(), [torch.zeros(0, 4)], [SIZE_HW], [target_of(0)])[1])
    sum(losses.values()).backward()
    assert [float(loss.detach()) for loss in losses.values()] == [0.0] * 3
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_predictors_leave_reduced_precision():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*BoxPredictor(8, 3)(torch.rand(2, 8)), MaskPredictor(4, 4, 3)(torch.rand(2, 4, 7, 7))]
    assert [output.dtype for output in outputs] == [torch.float32] * 3
    assert outputs[2].shape == (2, 3, 14, 14)


def test_initialisation_is_the_published_one():
    heads = heads_of(fpn_channels=16, box_head_channels=64, num_classes=40)
    assert float(heads.box_predictor.cls_score.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert float(heads.box_predictor.bbox_pred.weight[4:].detach().std()) == pytest.approx(0.001, rel=0.1)
    bound = math.sqrt(6 / (16 * 49 + 64))
    assert float(heads.box_head.fc6.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
    assert not heads.box_head.fc7.bias.any() and not heads.box_predictor.cls_score.bias.any()


def test_suppression_works_within_a_class():
    boxes = torch.tensor([[0.0, 0, 50, 50], [1.0, 0, 50, 50]])
    assert len(batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 2]), 0.5)) == 2
    logits = torch.tensor([[0.0, 4, 4, -9], [0.0, 3.9, 3.9, -9]])
    _, _, labels = DetectionSelector(0.05, 0.5, 100)(boxes, logits, [2], [SIZE_HW])
    assert sorted(labels[0].tolist()) == [1, 2]


def background_rows(box_predictor, mask_predictor):
    boxes, masks = box_predictor.bbox_pred, mask_predictor.mask_fcn_logits
    return [boxes.weight[:4], boxes.bias[:4], masks.weight[0], masks.bias[0]]


@pytest.mark.parametrize("build", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_rows_of_background_that_nothing_reads_stay_zero_in_training(build):
    heads = heads_of().train()
    optimizer = build(heads.parameters(), lr=0.1, weight_decay=0.3)
    others = [heads.box_predictor.bbox_pred.weight[4:], heads.mask_predictor.mask_fcn_logits.weight[1:]]
    before = [rows.detach().clone() for rows in others]
    for count in (3, 0, 2):
        losses = means(heads(random_levels(), [random_boxes(31)], [SIZE_HW], [target_of(count)])[1])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert not any(rows.any() for rows in background_rows(heads.box_predictor, heads.mask_predictor))
    assert not any(torch.equal(rows, copy) for rows, copy in zip(others, before, strict=True))


def test_shared_regression_has_one_box_for_all_classes():
    predictor = BoxPredictor(8, 4, shared_regression=True)
    assert [tuple(output.shape) for output in predictor(torch.rand(2, 8))] == [(2, 4), (2, 4)]


def test_boxes_change_level_in_proportion_to_the_anchors():
    small = heads_of(anchor_scale=2.0)
    assert [pool.finest_side for pool in (small.box_roi_pool, small.mask_roi_pool)] == [14.0, 14.0]
    assert heads_of().box_roi_pool.finest_side == 56.0
