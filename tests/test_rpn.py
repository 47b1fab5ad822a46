import math
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection import rpn as torchvision_rpn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou

from swin_dense.features import FeatureSpec
from swin_dense.heads import rpn
from swin_dense.heads.box_batches import EMPTY_BOX
from swin_dense.heads.detector_settings import DetectorSettings
from swin_dense.heads.rpn import RPNHead, cascade_rpn, published_rpn, torchvision_rpn_defaults
from swin_dense.training.loss_terms import means

SPECS = {f"p{k}": FeatureSpec(4, 2**k) for k in (2, 3, 4, 5, 6)}
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


def rpn_of(build=published_rpn, **changes):
    return build(SPECS, replace(SETTINGS, **changes))


def random_levels(num_images=1, size_hw=SIZE_HW, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(num_images, 4, *(-(-side // spec.stride) for side in size_hw), generator=generator)
        for name, spec in SPECS.items()
    }


def batch(num_images=1, sizes_hw=None, size_hw=SIZE_HW):
    return ImageList(torch.zeros(num_images, 3, *size_hw), sizes_hw or [size_hw] * num_images)


def lively(rpn, seed=1):
    """Offsets and scores of the size a trained network gives."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in rpn.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    rpn.head.conv[0][0].bias.data += 3  # cells whose channels are all cut off by the ReLU would tie
    return rpn


def target(boxes, padded_size_hw=SIZE_HW, size_hw=SIZE_HW, ignored=()):
    return {
        "ignored_boxes": torch.tensor(ignored).reshape(-1, 4),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "padded_size_hw": padded_size_hw,
        "size_hw": size_hw,
    }


def all_anchors(rpn, levels):
    return rpn.anchor_generator(batch(), list(levels.values()))[0]


def test_head_gives_full_precision_and_torchvisions_numbers():
    head = RPNHead(4, 3)
    levels = list(random_levels().values())
    plain = torchvision_rpn.RPNHead(4, 3)
    plain.load_state_dict(head.state_dict())
    for got, wanted in zip(head(levels), plain(levels), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        for maps in head(levels):
            assert all(map.dtype == torch.float32 for map in maps)


@pytest.mark.parametrize("training", [False, True])
def test_proposals_are_the_best_of_each_level_after_suppression(training):
    rpn = lively(rpn_of()).double().train(training)
    levels = {name: map.double() for name, map in random_levels().items()}
    targets = [target([[10.0, 12, 50, 70]])] if training else None
    with torch.no_grad():
        (proposals,), _ = rpn(batch(), levels, targets)
        logits, deltas = rpn.head(list(levels.values()))
    keep = 2000 if training else 1000
    boxes, scores, groups = [], [], []
    start = 0
    anchors = all_anchors(rpn, levels)
    for index, (logit, delta) in enumerate(zip(logits, deltas, strict=True)):
        score = logit[0].permute(1, 2, 0).flatten().sigmoid()
        code = delta[0].view(3, 4, *delta.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        decoded = rpn.box_coder.decode_single(code, anchors[start : start + len(code)])
        start += len(code)
        decoded[:, 0::2] = decoded[:, 0::2].clamp(0, SIZE_HW[1])
        decoded[:, 1::2] = decoded[:, 1::2].clamp(0, SIZE_HW[0])
        best = score.argsort(descending=True)[:keep]
        best = best[(decoded[best, 2:] > decoded[best, :2]).all(dim=1)]
        boxes.append(decoded[best])
        scores.append(score[best])
        groups.append(torch.full((len(best),), index))
    boxes, scores, groups = torch.cat(boxes), torch.cat(scores), torch.cat(groups)
    wanted = boxes[batched_nms(boxes, scores, groups, 0.7)[:1000]]
    assert proposals.shape == wanted.shape and torch.allclose(proposals, wanted, atol=1e-6)


def test_proposals_stay_within_each_image_and_never_exceed_1000():
    sizes_hw = [(96, 128), (61, 47)]
    rpn = lively(rpn_of(anchor_scale=2.0)).eval()
    with torch.no_grad():
        proposals, losses = rpn(batch(2, sizes_hw), random_levels(2), None)
    assert losses == {}
    for boxes, (height, width) in zip(proposals, sizes_hw, strict=True):
        assert 0 < len(boxes) <= 1000
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_proposals_whose_number_is_not_asked_for_end_with_empty_places(monkeypatch):
    network, levels = lively(rpn_of(anchor_scale=2.0)).train(), random_levels(3)
    images = batch(3, [(96, 128), (61, 47), (7, 5)])
    with torch.no_grad():
        outputs = network.anchor_outputs(images, levels)
        trimmed = network.proposals(outputs, images.image_sizes)
        monkeypatch.setattr(rpn, "counts_are_known", lambda values: False)
        padded = network.proposals(outputs, images.image_sizes)
        assert len({len(boxes) for boxes in network.eval().proposals(outputs, images.image_sizes)}) == 3
    assert len({len(boxes) for boxes in padded}) == 1 and len(trimmed[2]) < len(padded[2])
    for boxes, wanted in zip(padded, trimmed, strict=True):
        assert torch.equal(boxes[: len(wanted)], wanted)
        assert bool((boxes[len(wanted) :] == torch.tensor(EMPTY_BOX)).all())


def test_images_of_a_batch_are_assigned_as_each_alone():
    network, levels = rpn_of(), random_levels()
    targets = [
        target([[3.0, 4, 30, 33], [20.0, 10, 90, 80], [0.0, 0, 4, 3]]),
        target([], (64, 96)),
        target([[20.0, 10, 90, 80]], ignored=[[30.0, 20.0, 110.0, 90.0]]),
    ]
    anchors = all_anchors(network, levels)
    labels, boxes = network.assign_targets_to_anchors([anchors] * 3, targets)
    for index, alone in enumerate(targets):
        own_labels, own_boxes = network.assign_targets_to_anchors([anchors], [alone])
        assert torch.equal(labels[index], own_labels[0]) and torch.equal(boxes[index], own_boxes[0])


def slow_labels(anchors, boxes, takes_part):
    """1 object, 0 background, -1 no part; from the words of the published assignment."""
    iou = torch.where(takes_part, box_iou(boxes, anchors), -1.0)
    labels = []
    for index in range(len(anchors)):
        overlap = float(iou[:, index].max())
        is_best = any(
            float(iou[obj, index]) == float(iou[obj].max()) and float(iou[obj].max()) >= 0.3
            for obj in range(len(boxes))
        )
        labels.append(1.0 if overlap >= 0.7 or is_best else 0.0 if overlap < 0.3 else -1.0)
    return torch.where(takes_part, torch.tensor(labels), -1.0)


@pytest.mark.parametrize("padded_size_hw", [(96, 128), (64, 96), (32, 32)])
def test_anchor_labels_follow_the_published_assignment(padded_size_hw):
    rpn, levels = rpn_of(), random_levels()
    boxes = [[3.0, 4, 30, 33], [20.0, 10, 90, 80], [100.0, 70, 127, 95], [0.0, 0, 4, 3]]
    anchors = all_anchors(rpn, levels)
    (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [target(boxes, padded_size_hw)])
    cell = ((anchors[:, :2] + anchors[:, 2:]) / 2).round()
    inside = (cell[:, 0] < padded_size_hw[1]) & (cell[:, 1] < padded_size_hw[0])
    wanted = slow_labels(anchors, torch.tensor(boxes), inside)
    assert torch.equal(labels, wanted)
    if padded_size_hw == (96, 128):
        assert {-1.0, 0.0, 1.0} == set(labels.tolist())
    assert {tuple(box) for box in matched[labels == 1].tolist()} <= {tuple(box) for box in boxes}


@pytest.mark.parametrize("size_hw", [(96, 128), (59, 83)])
def test_anchor_labels_of_the_cascade_leave_out_anchors_that_cross_the_border(size_hw):
    rpn, levels = rpn_of(cascade_rpn), random_levels()
    boxes = [[3.0, 4, 30, 33], [20.0, 10, 80, 58], [0.0, 0, 40, 20]]
    anchors = all_anchors(rpn, levels)
    (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [target(boxes, SIZE_HW, size_hw)])
    inside = torch.tensor(
        [x1 >= 0 and y1 >= 0 and x2 < size_hw[1] and y2 < size_hw[0] for x1, y1, x2, y2 in anchors.tolist()]
    )
    assert torch.equal(labels, slow_labels(anchors, torch.tensor(boxes), inside))
    assert 0 < int((labels == 1).sum()) and not bool((labels[~inside] >= 0).any())
    assert {tuple(box) for box in matched[labels == 1].tolist()} <= {tuple(box) for box in boxes}


def test_images_smaller_than_every_anchor_train_the_cascade_with_gradients():
    rpn = rpn_of(cascade_rpn).train()
    losses = means(rpn(batch(), random_levels(), [target([[0.0, 0, 5, 7]], SIZE_HW, (7, 5))])[1])
    assert [float(loss.detach()) for loss in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in rpn.parameters())


def test_valid_anchors_are_the_cells_that_begin_inside_the_padded_image():
    rpn, levels = rpn_of(), random_levels()
    anchors = all_anchors(rpn, levels)
    (labels,), _ = rpn.assign_targets_to_anchors([anchors], [target([], (32, 64))])
    # ceil(32 / s) x ceil(64 / s) cells of each level, three anchors each.
    wanted = sum(3 * math.ceil(32 / spec.stride) * math.ceil(64 / spec.stride) for spec in SPECS.values())
    assert int((labels == 0).sum()) == wanted
    assert int((labels == -1).sum()) == len(labels) - wanted


@pytest.mark.parametrize(("build", "beta"), [(published_rpn, 0), (cascade_rpn, 1 / 9)])
def test_losses_follow_from_the_sampled_anchors(build, beta):
    rpn, levels = lively(rpn_of(build)).train(), random_levels()
    targets = [target([[10.0, 12, 50, 70]])]
    torch.manual_seed(0)
    with torch.no_grad():
        losses = means(rpn(batch(), levels, targets)[1])
    torch.manual_seed(0)
    anchors = all_anchors(rpn, levels)
    labels, matched = rpn.assign_targets_to_anchors([anchors], targets)
    rows, is_filled = (values[0] for values in rpn.fg_bg_sampler(labels))
    assert bool(is_filled.all()) and len(rows.unique()) == 256
    sampled = torch.zeros_like(labels[0], dtype=torch.bool).index_fill(0, rows, True)
    positive, negative = sampled & (labels[0] == 1), sampled & (labels[0] == 0)
    assert 0 < int(positive.sum()) <= 128 and torch.equal(positive | negative, sampled)
    logits, deltas = torchvision_rpn.concat_box_prediction_layers(*rpn.head(list(levels.values())))
    wanted = rpn.box_coder.encode(matched, [anchors])[0]
    gap = (deltas[positive] - wanted[positive]).abs()
    parabola = gap**2 / (2 * beta) if beta else gap
    distance = torch.where(gap < beta, parabola, gap - beta / 2).sum() / 256
    sign = torch.where(positive, 1.0, -1.0)
    entropy = torch.log1p(torch.exp(-sign * logits[:, 0]))[positive | negative].sum() / 256
    assert float(losses["loss_rpn_box_reg"]) == pytest.approx(float(distance.detach()), rel=1e-4)
    assert float(losses["loss_objectness"]) == pytest.approx(float(entropy.detach()), rel=1e-4)


@pytest.mark.parametrize("build", [published_rpn, cascade_rpn])
def test_anchors_in_a_region_to_ignore_are_objects_or_none(build):
    rpn, levels, region = rpn_of(build), random_levels(), [30.0, 20.0, 110.0, 90.0]
    anchors = all_anchors(rpn, levels)
    box = [[40.0, 30, 72, 62]]
    (plain,), (boxes,) = rpn.assign_targets_to_anchors([anchors], [target(box)])
    (labels,), (matched,) = rpn.assign_targets_to_anchors([anchors], [target(box, ignored=[region])])
    low, high = anchors[:, :2].clamp(min=torch.tensor(region[:2])), anchors[:, 2:].clamp(max=torch.tensor(region[2:]))
    area = (anchors[:, 2:] - anchors[:, :2]).prod(dim=1)
    inside = (high - low).clamp(min=0).prod(dim=1) / area >= 0.5
    assert torch.equal(labels, torch.where(inside & (plain == 0), -1, plain)) and torch.equal(boxes, matched)
    assert bool((labels[inside] == 1).any()) and bool((plain[inside] == 0).any()) and bool((labels == 0).any())
    published = rpn_of(build, ignore_overlap=None)
    (same,), _ = published.assign_targets_to_anchors([anchors], [target(box, ignored=[region])])
    assert torch.equal(same, plain)


def test_images_without_objects_give_no_box_loss_but_gradients():
    rpn = rpn_of().train()
    losses = means(rpn(batch(2), random_levels(2), [target([]), target([])])[1])
    assert float(losses["loss_rpn_box_reg"].detach()) == 0.0 and float(losses["loss_objectness"].detach()) > 0
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in rpn.parameters())


def test_network_in_training_is_another_with_the_same_weights():
    rpn = rpn_of(cascade_rpn).eval()
    twin = rpn.as_in_training()
    assert (twin.pre_nms_top_n(), twin.post_nms_top_n()) == (2000, 2000)
    assert not rpn.training and rpn.post_nms_top_n() == 1000 and twin.head is rpn.head
    rpn.to(torch.float64)
    assert all(one is other for one, other in zip(rpn.parameters(), twin.parameters(), strict=True))


def test_published_numbers():
    rpn = rpn_of()
    assert (rpn.train().pre_nms_top_n(), rpn.post_nms_top_n(), rpn.nms_thresh) == (2000, 1000, 0.7)
    assert (rpn.eval().pre_nms_top_n(), rpn.post_nms_top_n()) == (1000, 1000)
    cascade = rpn_of(cascade_rpn)
    assert (cascade.train().pre_nms_top_n(), cascade.post_nms_top_n(), cascade.nms_thresh) == (2000, 2000, 0.7)
    assert (cascade.eval().pre_nms_top_n(), cascade.post_nms_top_n()) == (1000, 1000)
    sampler = rpn.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (256, 0.5)


def test_torchvision_style_is_what_torchvision_builds():
    rpn = rpn_of(torchvision_rpn_defaults)
    assert isinstance(rpn, torchvision_rpn.RegionProposalNetwork)
    assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert (rpn.train().post_nms_top_n(), rpn.eval().post_nms_top_n()) == (2000, 1000)
    levels = random_levels()
    boxes, losses = rpn.train()(batch(), levels, [{"boxes": torch.tensor([[10.0, 12, 50, 70]])}])
    assert len(boxes) == 1 and set(losses) == {"loss_objectness", "loss_rpn_box_reg"}
