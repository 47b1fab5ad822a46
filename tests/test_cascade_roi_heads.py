import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import batched_nms, box_iou, generalized_box_iou

from swin_dense.box_masks import BoxMasks
from swin_dense.features import FeatureSpec
from swin_dense.heads.cascade_roi_heads import PUBLISHED_STAGES, cascade_roi_heads
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.mask_targets import mask_targets
from swin_dense.training.loss_terms import means

SPECS = {f"p{k}": FeatureSpec(4, 2**k) for k in (2, 3, 4, 5)}
SIZES_HW = [(96, 128), (83, 101)]  # before padding to 96 x 128
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
LOSSES = [f"loss_{kind}_{stage}" for stage in range(3) for kind in ("classifier", "box_reg", "mask")]
# Of the official configuration: IoU, standard deviations of the offsets, weight of the losses.
STAGES = (
    (0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    (0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    (0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)


def heads_of(shared_regression=False, **changes):
    torch.manual_seed(0)
    return cascade_roi_heads(SPECS, replace(SETTINGS, **changes), shared_regression)


def lively(heads):
    """Outputs and statistics that differ from box to box and from stage to stage, in float64."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in heads.named_parameters():
        if "predictor" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    for module in heads.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return heads.double()


def random_levels(num_images=2):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(num_images, 4, 96 // spec.stride, 128 // spec.stride, generator=generator).double()
        for name, spec in SPECS.items()
    }


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 50
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40 + 3), dim=1)


def target_of(count, image=0, seed=5):
    masks = torch.rand(count, *SIZES_HW[image], generator=torch.Generator().manual_seed(seed)) > 0.5
    return {
        "boxes": random_boxes(count, seed),
        "labels": torch.arange(count) % 3 + 1,
        "masks": BoxMasks.from_full(masks),
        "ignored_boxes": torch.zeros(0, 4),
    }


TARGETS = [target_of(3, 0, seed=5), target_of(2, 1, seed=6)]
NEAR = [target["boxes"] + torch.tensor([1.0, -1, 2, 0.5]) for target in TARGETS]
BORDER = [torch.tensor([[90.0, 60, 128, 96], [0, 0, 20, 30]]), torch.tensor([[70.0, 50, 101, 83], [0, 30, 17, 83]])]
PROPOSALS = [
    torch.cat((random_boxes(11), NEAR[0], BORDER[0])),
    torch.cat((NEAR[1], random_boxes(6, seed=1), BORDER[1])),
]


# ---- The cascade, step by step: the semantics of mmdetection's cascade_roi_head.py in plain loops.


def slow_move(box, offsets, stds, size_hw=None):
    (x1, y1, x2, y2), (dx, dy, dw, dh) = box.tolist(), (offsets * torch.tensor(stds).to(offsets)).tolist()
    limit = math.log(1000 / 16)
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx * width, (y1 + y2) / 2 + dy * height
    width *= math.exp(min(max(dw, -limit), limit))
    height *= math.exp(min(max(dh, -limit), limit))
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if size_hw is not None:
        corners = [min(max(c, 0), side) for c, side in zip(corners, (size_hw[1], size_hw[0]) * 2, strict=True)]
    return torch.tensor(corners, dtype=torch.float64)


def offsets_of(deltas, label):
    return deltas if len(deltas) == 4 else deltas[4 * label : 4 * label + 4]


def stage_outputs(heads, stage, levels, boxes):
    return heads.box_predictor[stage](heads.box_head[stage](heads.box_roi_pool(levels, boxes, SIZES_HW)))


def slow_losses(heads, levels, proposals, targets):
    """All boxes are samples; returns the losses and how many boxes stood for an object in each stage."""
    losses, num_objects = {}, []
    for stage, (threshold, stds, weight) in enumerate(STAGES):
        rows = []  # image, box, label, object, whether it is an object's own box
        for image, (boxes, target) in enumerate(zip(proposals, targets, strict=True)):
            for own, candidates in ((False, boxes), (True, target["boxes"])):
                for box in candidates:
                    iou = [float(box_iou(box[None], other[None])) for other in target["boxes"]]
                    best = max(range(len(iou)), key=iou.__getitem__, default=None)
                    is_object = best is not None and iou[best] >= threshold
                    rows.append((image, box, int(target["labels"][best]) if is_object else 0, best, own))
        boxes = [torch.stack([row[1] for row in rows if row[0] == image]) for image in range(len(targets))]
        logits, deltas = stage_outputs(heads, stage, levels, boxes)
        entropy = overlap = mask_entropy = objects = 0.0
        proposals = [[] for _ in targets]
        for (image, box, label, best, own), row_logits, row_deltas in zip(rows, logits, deltas, strict=True):
            entropy -= float(row_logits.log_softmax(dim=0)[label])
            if label:
                target = targets[image]
                refined = slow_move(box, offsets_of(row_deltas, label), stds)
                overlap += 1 - float(generalized_box_iou(refined[None], target["boxes"][best][None]))
                alone = [box[None] if index == image else box.new_zeros(0, 4) for index in range(len(targets))]
                masks = heads.mask_predictor[stage](heads.mask_head[stage](heads.mask_roi_pool(levels, alone, [])))
                wanted = mask_targets(target["masks"], box[None], torch.tensor([best]), 28)
                mask_entropy += float(binary_cross_entropy_with_logits(masks[0, label], wanted[0]))
                objects += 1
            if not own:
                label = label or 1 + int(row_logits[1:].argmax())
                proposals[image].append(slow_move(box, offsets_of(row_deltas, label), stds, SIZES_HW[image]))
        proposals = [torch.stack(moved) for moved in proposals]
        losses[f"loss_classifier_{stage}"] = weight * entropy / len(rows)
        losses[f"loss_box_reg_{stage}"] = weight * 10 * overlap / len(rows)
        losses[f"loss_mask_{stage}"] = weight * mask_entropy / objects
        num_objects.append(int(objects))
    return losses, num_objects


def slow_detections(heads, levels, proposals):
    boxes, all_logits = proposals, []
    for stage, (_, stds, _) in enumerate(STAGES):
        logits, deltas = stage_outputs(heads, stage, levels, boxes)
        all_logits.append(logits)
        if stage < 2:
            moved, row = [], 0
            for image_boxes, size_hw in zip(boxes, SIZES_HW, strict=True):
                moved.append([])
                for box in image_boxes:
                    label = 1 + int(logits[row, 1:].argmax())
                    moved[-1].append(slow_move(box, offsets_of(deltas[row], label), stds, size_hw))
                    row += 1
            boxes = [torch.stack(image_boxes) for image_boxes in moved]
    scores = (sum(all_logits) / 3).softmax(dim=1)
    results, row = [], 0
    for image, (image_boxes, size_hw) in enumerate(zip(boxes, SIZES_HW, strict=True)):
        found = []
        for box in image_boxes:
            for label in range(1, 4):
                if scores[row, label] > 0.05:
                    last = slow_move(box, offsets_of(deltas[row], label), STAGES[2][1], size_hw)
                    found.append((last, float(scores[row, label]), label))
            row += 1
        last, score, label = (
            torch.stack([f[0] for f in found]),
            torch.tensor([f[1] for f in found], dtype=torch.float64),
            torch.tensor([f[2] for f in found]),
        )
        keep = batched_nms(last, score, label, 0.5)[:100]
        last, score, label = last[keep], score[keep], label[keep]
        alone = [last if index == image else last.new_zeros(0, 4) for index in range(2)]
        pooled = heads.mask_roi_pool(levels, alone, SIZES_HW)
        masks = [heads.mask_predictor[s](heads.mask_head[s](pooled)).sigmoid() for s in range(3)]
        masks = (sum(masks) / 3)[torch.arange(len(label)), label]
        results.append({"boxes": last, "scores": score, "labels": label, "masks": masks[:, None]})
    return results


@pytest.mark.parametrize("shared", [False, True])
def test_losses_equal_the_cascade_in_plain_loops(shared):
    heads = lively(heads_of(shared, samples_per_image=10**6)).train()  # no limit: nothing is left to chance
    levels = random_levels()
    with torch.no_grad():
        losses = means(heads(levels, PROPOSALS, SIZES_HW, TARGETS)[1])
        wanted, num_objects = slow_losses(heads, levels, PROPOSALS, TARGETS)
    assert list(losses) == LOSSES and num_objects[0] >= 10 and min(num_objects) >= 5
    for name, loss in losses.items():
        assert float(loss) == pytest.approx(wanted[name], rel=1e-6), name


@pytest.mark.parametrize("shared", [False, True])
def test_detections_equal_the_cascade_in_plain_loops(shared):
    heads, levels = lively(heads_of(shared)).eval(), random_levels()
    with torch.no_grad():
        results, losses = heads(levels, PROPOSALS, SIZES_HW)
        wanted = slow_detections(heads, levels, PROPOSALS)
    assert losses == {}
    for one, other in zip(results, wanted, strict=True):
        assert len(one["labels"]) > 10 and torch.equal(one["labels"], other["labels"])
        for name in ("boxes", "scores", "masks"):
            assert one[name].shape == other[name].shape
            assert torch.allclose(one[name], other[name], atol=1e-9)


# ---- Laws of inference.


def equal_stages(heads):
    """All three stages with the weights of the first."""
    for parts in (heads.box_head, heads.box_predictor, heads.mask_head, heads.mask_predictor):
        for part in parts[1:]:
            part.load_state_dict(parts[0].state_dict())
    return heads


def without_offsets(heads):
    for predictor in heads.box_predictor:
        nn.init.zeros_(predictor.bbox_pred.weight)
        nn.init.zeros_(predictor.bbox_pred.bias)
    return heads


def test_equal_stages_without_offsets_answer_like_one_stage():
    heads, levels = without_offsets(equal_stages(lively(heads_of(score_threshold=0.0)))).eval(), random_levels()
    with torch.no_grad():
        results, _ = heads(levels, PROPOSALS, SIZES_HW)
        logits, _ = stage_outputs(heads, 0, levels, PROPOSALS)
    probabilities = logits.softmax(dim=1).split([len(boxes) for boxes in PROPOSALS])
    for result, proposals, scores, (height, width) in zip(results, PROPOSALS, probabilities, SIZES_HW, strict=True):
        clipped = proposals.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        assert len(result["boxes"]) > 10
        for box, score, label in zip(result["boxes"], result["scores"], result["labels"], strict=True):
            row = int((clipped - box).abs().sum(dim=1).argmin())
            assert torch.allclose(clipped[row], box) and torch.allclose(scores[row, label], score)


def test_scores_are_the_softmax_of_the_mean_logits():
    heads = without_offsets(heads_of(score_threshold=0.0)).double().eval()
    biases = [torch.tensor(values).double() for values in ([0.0, 1, 2, 3], [2.0, -1, 0, 5], [1.0, 1, -4, 0])]
    for predictor, bias in zip(heads.box_predictor, biases, strict=True):
        nn.init.zeros_(predictor.cls_score.weight)
        predictor.cls_score.bias.data = bias
    with torch.no_grad():
        (result, _), _ = heads(random_levels(), [random_boxes(1), random_boxes(0)], SIZES_HW)
    wanted = (sum(biases) / 3).softmax(dim=0)
    assert torch.allclose(result["scores"], wanted[result["labels"]]) and sorted(result["labels"].tolist()) == [1, 2, 3]


def test_masks_are_the_mean_of_the_probabilities():
    heads = heads_of(score_threshold=0.0).double().eval()
    biases = [[0.0, 1.0, 5.0, -5.0], [0.0, -2.0, 5.0, 4.0], [0.0, 3.0, 5.0, 1.0]]
    for predictor, bias in zip(heads.mask_predictor, biases, strict=True):
        nn.init.zeros_(predictor.mask_fcn_logits.weight)
        predictor.mask_fcn_logits.bias.data = torch.tensor(bias).double()
    with torch.no_grad():
        results, _ = heads(random_levels(), PROPOSALS, SIZES_HW)
    wanted = torch.tensor(biases).double().sigmoid().mean(dim=0)
    for result in results:
        assert len(result["labels"]) > 0
        for mask, label in zip(result["masks"], result["labels"], strict=True):
            assert mask.shape == (1, 28, 28) and torch.allclose(mask, wanted[label])


def test_each_stage_looks_at_the_boxes_of_the_one_before():
    heads, levels = without_offsets(lively(heads_of())).eval(), random_levels()
    for predictor in heads.box_predictor:
        predictor.bbox_pred.bias.data = torch.tensor([1.0, 0, 0, 0]).double().repeat(4)
    seen = []
    heads.box_roi_pool.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1][0]))
    with torch.no_grad():
        heads(levels, PROPOSALS, SIZES_HW)
    first, second, third = seen
    right = torch.tensor([1.0, 0, 1, 0])
    for before, after, std in ((first, second, 0.1), (second, third, 0.05)):
        moved = before + right * std * (before[:, 2:3] - before[:, :1])
        assert torch.allclose(after, moved.clamp(max=128))


def test_a_batch_is_each_image_alone():
    heads, levels = lively(heads_of()).eval(), random_levels()
    with torch.no_grad():
        together, _ = heads(levels, PROPOSALS, SIZES_HW)
        for image, result in enumerate(together):
            own_levels = {name: level[image : image + 1] for name, level in levels.items()}
            (alone,), _ = heads(own_levels, [PROPOSALS[image]], [SIZES_HW[image]])
            assert len(alone["labels"]) > 0 and torch.equal(alone["labels"], result["labels"])
            assert all(torch.allclose(alone[name], result[name], atol=1e-9) for name in ("boxes", "scores", "masks"))


@pytest.mark.parametrize("counts", [(0, 0), (5, 0)])
def test_images_without_proposals_have_no_detections(counts):
    heads = lively(heads_of()).eval()
    with torch.no_grad():
        results, _ = heads(random_levels(), [random_boxes(count) for count in counts], SIZES_HW)
    for result, count in zip(results, counts, strict=True):
        assert (len(result["boxes"]) > 0) == (count > 0)
        assert result["boxes"].shape[1:] == (4,) and result["masks"].shape[1:] == (1, 28, 28)


# ---- Laws of training.


def test_numbers_are_the_published_ones():
    assert tuple((stage.iou, stage.stds, stage.loss_weight) for stage in PUBLISHED_STAGES) == STAGES
    for stage, (iou, stds, weight) in zip(heads_of().stages, STAGES, strict=True):
        matcher, draw = stage.sample.matcher, stage.sample.draw
        assert (matcher.positive_iou, matcher.negative_iou, matcher.minimum_iou) == (iou, iou, None)
        assert (draw.batch_size_per_image, draw.positive_fraction) == (512, 0.25)
        assert [1 / weight for weight in stage.box_coder.weights] == pytest.approx(list(stds))
        assert stage.loss_weight == weight


def test_perfect_boxes_have_no_box_loss():
    heads = without_offsets(heads_of()).double().train()
    exact = [target["boxes"].clone() for target in TARGETS]
    losses = means(heads(random_levels(), exact, SIZES_HW, TARGETS)[1])
    assert [float(losses[f"loss_box_reg_{stage}"].detach()) for stage in range(3)] == pytest.approx([0] * 3, abs=1e-6)


def test_equal_stages_on_equal_boxes_have_losses_in_proportion_to_their_weights():
    heads = without_offsets(equal_stages(lively(heads_of()))).train()
    losses = means(heads(random_levels(), [random_boxes(0)] * 2, SIZES_HW, TARGETS)[1])  # the objects' own boxes only
    for kind in ("classifier", "mask"):
        first, second, third = (float(losses[f"loss_{kind}_{stage}"].detach()) for stage in range(3))
        assert first > 0 and (second, third) == pytest.approx((first / 2, first / 4))


def test_stages_after_the_first_choose_among_the_samples_of_the_one_before():
    heads, levels = without_offsets(lively(heads_of(samples_per_image=16))).train(), random_levels()
    seen = []
    heads.box_roi_pool.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1][0]))
    heads(levels, [random_boxes(200), random_boxes(3)], SIZES_HW, TARGETS)
    first, second, third = ({tuple(box) for box in boxes.mul(1e6).round().tolist()} for boxes in seen)
    own = {tuple(box) for box in TARGETS[0]["boxes"].mul(1e6).round().tolist()}
    assert len(first) == 16 and 0 < len(third - own) <= len(second - own) <= 16
    assert second - own <= first and third - own <= second


def test_no_gradient_runs_through_the_boxes_of_a_later_stage():
    heads, levels = lively(heads_of(samples_per_image=10**6)).train(), random_levels()
    losses = means(heads(levels, PROPOSALS, SIZES_HW, TARGETS)[1])
    sum(loss for name, loss in losses.items() if not name.endswith("_0")).backward()
    for name, parameter in heads.named_parameters():
        assert (parameter.grad is None) == (name.split(".")[1] == "0"), name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("num_objects", "num_proposals"), [((3, 2), 9), ((0, 2), 9), ((0, 0), 9), ((2, 0), 0), ((0, 0), 0)]
)
def test_losses_are_finite_and_reach_every_parameter(num_objects, num_proposals, shared):
    heads = heads_of(shared).double().train()
    targets = [target_of(count, image) for image, count in enumerate(num_objects)]
    detections, terms = heads(random_levels(), [random_boxes(num_proposals)] * 2, SIZES_HW, targets)
    losses = means(terms)
    assert detections == [] and list(losses) == LOSSES
    assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
    if not any(num_objects):
        assert not any(float(losses[name].detach()) for name in LOSSES if "classifier" not in name)
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in heads.buffers())


@pytest.mark.parametrize("build", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_rows_of_background_that_nothing_reads_stay_zero_in_training(build):
    heads = heads_of().double().train()
    optimizer = build(heads.parameters(), lr=0.1, weight_decay=0.3)
    for targets in (TARGETS, [target_of(0, 0), target_of(0, 1)], TARGETS):
        losses = means(heads(random_levels(), PROPOSALS, SIZES_HW, targets)[1])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for predictor, mask_predictor in zip(heads.box_predictor, heads.mask_predictor, strict=True):
        boxes, masks = predictor.bbox_pred, mask_predictor.mask_fcn_logits
        assert not any(rows.any() for rows in (boxes.weight[:4], boxes.bias[:4], masks.weight[0], masks.bias[0]))
        assert boxes.weight[4:].any() and masks.weight[1:].any()


# ---- Structure.


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_have_the_promised_names_and_shapes(shared):
    heads = heads_of(shared)
    shapes = {name: tuple(value.shape) for name, value in heads.named_parameters()}
    wanted = {}
    for s in range(3):
        for i in range(4):
            wanted[f"box_head.{s}.{i}.0.weight"] = (4, 4, 3, 3)
            wanted[f"mask_head.{s}.{i}.0.weight"] = (6, 4 if i == 0 else 6, 3, 3)
            wanted |= {f"box_head.{s}.{i}.1.{name}": (4,) for name in ("weight", "bias")}
            wanted[f"mask_head.{s}.{i}.0.bias"] = (6,)
        for part, rows, columns in (
            (f"box_head.{s}.5", 16, (4 * 7 * 7,)),
            (f"box_predictor.{s}.cls_score", 4, (16,)),
            (f"box_predictor.{s}.bbox_pred", 4 if shared else 16, (16,)),
            (f"mask_predictor.{s}.mask_fcn_logits", 4, (6, 1, 1)),
        ):
            wanted |= {f"{part}.weight": (rows, *columns), f"{part}.bias": (rows,)}
        wanted |= {f"mask_predictor.{s}.conv5_mask.weight": (6, 6, 2, 2), f"mask_predictor.{s}.conv5_mask.bias": (6,)}
    assert shapes == wanted


def test_initialisation_is_the_published_one():
    heads = heads_of(fpn_channels=16, box_head_channels=64, num_classes=40)
    for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
        bound = math.sqrt(6 / (16 * 49 + 64))
        assert float(head[5].weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(head[0][0].weight.detach().std()) == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)
        assert float(predictor.cls_score.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
        assert float(predictor.bbox_pred.weight[4:].detach().std()) == pytest.approx(0.001, rel=0.1)
        assert not any(bias.any() for bias in (head[5].bias, predictor.cls_score.bias, predictor.bbox_pred.bias))


def test_shared_regression_starts_with_all_four_rows_alive():
    heads = heads_of(shared_regression=True)
    assert all(bool(predictor.bbox_pred.weight.any(dim=1).all()) for predictor in heads.box_predictor)
