import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from swin_dense.heads import matching
from swin_dense.heads.box_batches import EMPTY_BOX, is_box, stack_boxes
from swin_dense.heads.matching import (
    BalancedSampler,
    BoxCoder,
    MaxIoUMatcher,
    ProposalSampler,
    pick_class,
    without_ignored,
)

NEGATIVE, IGNORED = -1, -2
NOWHERE = torch.zeros(0, 4)


def slow_match(iou, positive, negative, minimum):
    """The published assignment, pair by pair."""
    num_objects, num_boxes = len(iou), len(iou[0])
    matches = []
    for box in range(num_boxes):
        overlaps = [iou[obj][box] for obj in range(num_objects)]
        best = max(range(num_objects), key=lambda obj: (overlaps[obj], -obj))
        matches.append(best if overlaps[best] >= positive else NEGATIVE if overlaps[best] < negative else IGNORED)
    for obj in range(num_objects):
        best_overlap = max(iou[obj])
        if best_overlap >= minimum:
            for box in range(num_boxes):
                if iou[obj][box] == best_overlap:
                    matches[box] = obj
    return matches


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.5, 0.25, 0.0)]))
def test_matcher_equals_the_slow_double_loop(data, thresholds):
    num_objects, num_boxes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    # Few distinct values, so that ties and exact thresholds occur.
    value = st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0])
    row = st.lists(value, min_size=num_boxes, max_size=num_boxes)
    iou = data.draw(st.lists(row, min_size=num_objects, max_size=num_objects))
    matcher, matrix = MaxIoUMatcher(*thresholds), torch.tensor(iou)
    assert matcher.match([matrix]).tolist() == slow_match(iou, *thresholds)
    assert matcher.match(matrix.split(data.draw(st.integers(1, 4)))).tolist() == slow_match(iou, *thresholds)


def test_matcher_equals_the_slow_double_loop_on_real_boxes():
    torch.manual_seed(0)
    corner, size = torch.rand(307, 2) * 90, torch.rand(307, 2) * 40 + 1
    boxes = torch.cat((corner, corner + size), dim=1)
    iou = box_iou(boxes[:11], boxes[11:])
    for thresholds in ((0.7, 0.3, 0.3), (0.5, 0.5, 0.5)):
        assert MaxIoUMatcher(*thresholds)(boxes[:11], boxes[11:]).tolist() == slow_match(iou.tolist(), *thresholds)


@pytest.mark.parametrize("count", [0, 1, 16, 17, 61])
def test_matcher_without_the_rule_for_best_boxes_is_torchvisions(count, monkeypatch):
    monkeypatch.setitem(matching.PAIRS_AT_ONCE, "cpu", 907 * 4)  # objects go in parts
    torch.manual_seed(0)
    corner, size = torch.rand(907, 2) * 50, torch.rand(907, 2) * 40 + 5
    boxes = torch.cat((corner, corner + size), dim=1)
    matches = MaxIoUMatcher(0.6, 0.4, None)(boxes[:count], boxes)
    wanted = Matcher(0.6, 0.4)(box_iou(boxes[:count], boxes)) if count else torch.full((907,), -1)
    assert torch.equal(matches, wanted) and matches.dtype == torch.int64


def test_matcher_gives_an_object_its_best_box_only_from_the_minimum_on():
    matcher = MaxIoUMatcher(0.7, 0.3, 0.3)
    assert matcher.match([torch.tensor([[0.2, 0.1]])]).tolist() == [NEGATIVE, NEGATIVE]
    assert matcher.match([torch.tensor([[0.3, 0.1]])]).tolist() == [0, NEGATIVE]
    assert matcher.match([torch.tensor([[0.5, 0.4, 0.6, 0.6]])]).tolist() == [IGNORED, IGNORED, 0, 0]


def test_matcher_gives_a_shared_best_box_to_the_last_object():
    assert MaxIoUMatcher(0.7, 0.3, 0.3).match([torch.tensor([[0.9], [0.4]])]).tolist() == [1]


def test_matcher_takes_batches_whose_images_have_unequal_numbers_of_objects():
    torch.manual_seed(1)
    corner = torch.rand(4, 61, 2) * 60
    boxes = torch.cat((corner, corner + torch.rand(4, 61, 2) * 40 + 5), dim=2)
    objects = [image[:count] for image, count in zip(boxes, (3, 0, 11, 1), strict=True)]
    is_candidate = torch.rand(4, 61) > 0.3
    for matcher in (MaxIoUMatcher(0.7, 0.3, 0.3), MaxIoUMatcher(0.5, 0.5, None), MaxIoUMatcher(0.5, 0.25, 0.0)):
        together = matcher(stack_boxes(objects), boxes, is_candidate)
        for image in range(4):
            rows = is_candidate[image]
            assert torch.equal(together[image, rows], matcher(objects[image], boxes[image, rows]))
            assert bool((together[image, ~rows] == NEGATIVE).all())


def test_matcher_leaves_the_matrix_alone():
    iou = torch.rand(3, 5)
    copy = iou.clone()
    MaxIoUMatcher(0.5, 0.5, 0.5).match([iou])
    assert torch.equal(iou, copy)


# ---- Samples.


def crowd_of_boxes(seed=2):
    """Three objects, boxes all around them, and boxes anywhere."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(503, 2, generator=generator) * 60
    boxes = torch.cat((corner, corner + torch.rand(503, 2, generator=generator) * 60 + 3), dim=1)
    objects = boxes[:3]
    around = [objects + torch.randn(3, 4, generator=generator) * scale for scale in torch.linspace(0.5, 12, 60)]
    proposals = torch.cat((*around, boxes[3:]))
    return proposals[(proposals[:, 2:] > proposals[:, :2]).all(dim=1)], {
        "boxes": objects,
        "labels": torch.tensor([2, 1, 3]),
        "ignored_boxes": NOWHERE,
    }


def samples_of(sampler, proposals, target):
    """Of one image, without empty places."""
    ((samples,), (objects,)) = sampler([proposals], [target]).trimmed()
    assert torch.equal(samples.labels[: len(objects.labels)], objects.labels) and bool((objects.labels > 0).all())
    assert not bool((samples.labels[len(objects.labels) :] > 0).any())
    return samples


def in_order(boxes, *others):
    """Rows sorted by their coordinates."""
    order = sorted(range(len(boxes)), key=lambda row: boxes[row].tolist())
    return [value[order] for value in (boxes, *others)]


@pytest.mark.parametrize("iou_threshold", [0.5, 0.7])
def test_samples_are_labelled_by_the_object_they_overlap_most(iou_threshold):
    proposals, target = crowd_of_boxes()
    sampler = ProposalSampler(MaxIoUMatcher(iou_threshold, iou_threshold, None), 512, 0.25, None)
    samples = samples_of(sampler, proposals, target)
    assert samples.boxes.shape == (512, 4) and 0 < int((samples.labels > 0).sum()) <= 128
    best, best_object = box_iou(target["boxes"], samples.boxes).max(dim=0)
    is_object = samples.labels > 0
    assert torch.equal(is_object, best >= iou_threshold)
    assert torch.equal(samples.matched[is_object], best_object[is_object])
    assert torch.equal(samples.labels[is_object], target["labels"][best_object][is_object])
    assert torch.equal(samples.matched_boxes[is_object], target["boxes"][best_object][is_object])


def test_samples_without_a_limit_are_all_proposals_and_the_objects_themselves():
    proposals, target = crowd_of_boxes()
    samples = samples_of(ProposalSampler(MaxIoUMatcher(0.5, 0.5, None), 10**6, 0.25, None), proposals, target)
    assert torch.equal(*(in_order(boxes)[0] for boxes in (samples.boxes, torch.cat((proposals, target["boxes"])))))
    themselves = samples.is_object_itself
    own = in_order(samples.boxes[themselves], samples.labels[themselves])
    assert all(torch.equal(*pair) for pair in zip(own, in_order(target["boxes"], target["labels"]), strict=True))


@pytest.mark.parametrize("limit", [1, 16, 37])
def test_samples_keep_their_limit_and_the_share_of_objects(limit):
    proposals, target = crowd_of_boxes()
    samples = samples_of(ProposalSampler(MaxIoUMatcher(0.5, 0.5, None), limit, 0.25, None), proposals, target)
    assert len(samples.boxes) == limit and int((samples.labels > 0).sum()) == limit // 4


def test_samples_of_an_image_without_objects_are_background():
    proposals, _ = crowd_of_boxes()
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "ignored_boxes": NOWHERE}
    sample = ProposalSampler(MaxIoUMatcher(0.5, 0.5, None), 100, 0.25, None)
    samples = samples_of(sample, proposals, target)
    assert len(samples.boxes) == 100 and not samples.labels.any() and not samples.is_object_itself.any()
    nothing = samples_of(sample, torch.zeros(0, 4), target)
    assert nothing.boxes.shape == (0, 4) and nothing.labels.dtype == torch.int64


def share_inside(box, region):
    width = max(0.0, min(box[2], region[2]) - max(box[0], region[0]))
    height = max(0.0, min(box[3], region[3]) - max(box[1], region[1]))
    return width * height / ((box[2] - box[0]) * (box[3] - box[1]))


def test_samples_in_a_region_to_ignore_are_objects_or_none():
    proposals, target = crowd_of_boxes()
    regions = torch.tensor([[10.0, 5, 60, 70], [50, 60, 110, 100]])
    limitless = ProposalSampler(MaxIoUMatcher(0.5, 0.5, None), 10**6, 0.25, 0.5)
    everything = samples_of(limitless, proposals, target)
    samples = samples_of(limitless, proposals, {**target, "ignored_boxes": regions})
    inside = torch.tensor(
        [max(share_inside(box, r) for r in regions.tolist()) >= 0.5 for box in everything.boxes.tolist()]
    )
    kept = (everything.labels > 0) | ~inside
    assert 20 < int(kept.sum()) < len(kept) - 20 and bool((everything.labels[inside] > 0).any())
    wanted = in_order(everything.boxes[kept], everything.labels[kept])
    assert all(torch.equal(*pair) for pair in zip(in_order(samples.boxes, samples.labels), wanted, strict=True))
    assert len(samples_of(limitless, proposals[:0], {**target, "ignored_boxes": regions}).boxes) == 3


@pytest.mark.parametrize("pairs_at_once", [1, 2**20])
def test_labels_lose_the_background_in_regions_to_ignore(pairs_at_once, monkeypatch):
    monkeypatch.setitem(matching.PAIRS_AT_ONCE, "cpu", pairs_at_once)
    labels = torch.tensor([0, 0, 0, 2, -1])
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [6, 0, 16, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    region = torch.tensor([[-50.0, -50, 10, 70]])
    assert without_ignored(labels, boxes, region, 0.5).tolist() == [-1, -1, 0, 2, -1]
    assert without_ignored(labels, boxes, region, 1.0).tolist() == [-1, 0, 0, 2, -1]
    # Two regions that only together cover a box: as in COCO's evaluation, one must do.
    halves = torch.tensor([[-50.0, -50, 4, 70], [4, -50, 8, 70]])
    assert without_ignored(labels, boxes, halves, 0.5).tolist() == [0, 0, 0, 2, -1]
    for changes in ((region, None), (region + 900, 0.5), (NOWHERE, 0.5)):
        assert torch.equal(without_ignored(labels, boxes, *changes), labels)


def test_overlap_with_a_region_is_measured_as_coco_measures_that_with_crowds():
    from pycocotools import mask as coco_mask

    boxes, _ = crowd_of_boxes()
    region = torch.tensor([[20.0, 10, 70, 55]])
    as_xywh = [torch.cat((b[:, :2], b[:, 2:] - b[:, :2]), dim=1).double().numpy() for b in (boxes, region)]
    overlap = torch.from_numpy(coco_mask.iou(*as_xywh, [1]))[:, 0]
    for threshold in (0.3, 0.5, 0.9):
        labels = without_ignored(torch.zeros(len(boxes)), boxes, region, threshold)
        sure = (overlap - threshold).abs() > 1e-5
        assert torch.equal((labels == -1)[sure], (overlap >= threshold)[sure])


def test_samples_of_a_batch_are_those_of_its_images():
    proposals, target = crowd_of_boxes()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "ignored_boxes": NOWHERE}
    region = {**target, "ignored_boxes": torch.tensor([[10.0, 5, 60, 70]])}
    batch = [(proposals[:97], target), (proposals[:41], none), (proposals, region), (proposals[:0], none)]
    sampler = ProposalSampler(MaxIoUMatcher(0.5, 0.5, 0.5), 10**6, 0.25, 0.5)
    together, _ = sampler(*zip(*batch, strict=True)).trimmed()
    for samples, alone in zip(together, batch, strict=True):
        one, other = (in_order(*vars(found).values()) for found in (samples, samples_of(sampler, *alone)))
        is_object = one[1] > 0  # of background it does not matter which object was nearest
        assert all(torch.equal(*pair) for pair in zip(one[:2], other[:2], strict=True))
        assert all(torch.equal(a[is_object], b[is_object]) for a, b in zip(one[2:], other[2:], strict=True))
        assert torch.equal(one[4], other[4])


def test_samples_fill_places_from_the_front_and_say_which_are_empty():
    proposals, target = crowd_of_boxes()
    empty = torch.tensor(EMPTY_BOX).expand(13, 4)
    sampler = ProposalSampler(MaxIoUMatcher(0.5, 0.5, 0.5), 512, 0.25, None)
    samples = sampler([torch.cat((proposals[:97], empty)), torch.cat((empty, proposals[:51]))], [target, target])
    assert samples.labels.shape == (2, 113)  # 110 places and three objects
    assert (samples.labels >= 0).sum(dim=1).tolist() == [100, 54]
    assert torch.equal(samples.labels >= 0, is_box(samples.boxes))
    kinds = samples.labels.clamp(-1, 1)
    assert torch.equal(kinds, kinds.sort(dim=1, descending=True).values)
    for image, trimmed in zip(samples.places(), samples.trimmed()[0], strict=True):
        assert torch.equal(image.boxes[: len(trimmed.boxes)], trimmed.boxes)
        assert not is_box(image.boxes[len(trimmed.boxes) :]).any()


def test_sampling_is_even():
    labels = torch.tensor([[1, 0, 0, -1, 1, 0, 1, 0, 0, 0], [0, 0, -1, 0, 0, 0, -1, 0, 0, 0]])
    counts = torch.zeros(2, 10)
    torch.manual_seed(0)
    for _ in range(3000):
        rows, is_filled = BalancedSampler(4, 0.5)(labels)
        assert bool(is_filled.all())
        counts += torch.zeros(2, 10).scatter(1, rows, 1.0)
    wanted = torch.tensor([[2 / 3, 1 / 3, 1 / 3, 0, 2 / 3, 1 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3], [0.5] * 10])
    wanted[1, [2, 6]] = 0
    assert torch.allclose(counts / 3000, wanted, atol=0.04)


def test_samples_leave_proposals_and_target_alone():
    proposals, target = crowd_of_boxes()
    before = [proposals.clone(), *(value.clone() for value in target.values())]
    ProposalSampler(MaxIoUMatcher(0.5, 0.5, None), 100, 0.25, None)([proposals], [target])
    assert all(torch.equal(one, other) for one, other in zip(before, [proposals, *target.values()], strict=True))


def test_pick_class_takes_the_group_of_the_class_or_the_only_one():
    values, rows, labels = torch.arange(24.0).view(2, 12), torch.tensor([1, 0, 1]), torch.tensor([2, 1, 0])
    wanted = [[20, 21, 22, 23], [4, 5, 6, 7], [12, 13, 14, 15]]
    assert pick_class(values, rows, labels).tolist() == wanted
    assert torch.equal(pick_class(values[:, :4], rows, labels), values[rows, :4])
    assert pick_class(values[:0], rows[:0], labels[:0]).shape == (0, 4)


# ---- Boxes.

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
LIMIT = math.log(1000 / 16)


def random_boxes(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 300
    return torch.cat((corner, corner + torch.rand(count, 2, generator=generator, dtype=dtype) * 200 + 5), dim=1)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0)])
def test_decode_undoes_encode(weights):
    coder, boxes, references = BoxCoder(weights), random_boxes(31), random_boxes(32)[:31]
    codes = coder.encode_single(boxes, references)
    assert torch.allclose(coder.decode_single(codes, references), boxes, atol=1e-9)


@pytest.mark.parametrize("code", [(1.0, -2.0, 0.5, -0.5), (0.0, 0.0, 99.0, 0.0), (0.0, 0.0, -99.0, 99.0)])
def test_decode_follows_the_closed_form_with_both_clamps(code):
    x1, y1, x2, y2 = 10.0, 20.0, 50.0, 30.0
    dx, dy, dw, dh = (value / weight for value, weight in zip(code, WEIGHTS, strict=True))
    centre_x, centre_y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    width = (x2 - x1) * math.exp(min(max(dw, -LIMIT), LIMIT))
    height = (y2 - y1) * math.exp(min(max(dh, -LIMIT), LIMIT))
    wanted = (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
    decoded = BoxCoder(WEIGHTS).decode_single(torch.tensor([code]).double(), torch.tensor([[x1, y1, x2, y2]]).double())
    assert decoded[0].tolist() == pytest.approx(wanted)


def test_decode_never_grows_or_shrinks_a_side_by_more_than_62_5():
    codes = torch.tensor([[0.0, 0.0, -1e4, 1e4]])
    x1, y1, x2, y2 = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(codes, torch.tensor([[0.0, 0.0, 100.0, 10.0]]))[0]
    assert float(x2 - x1) == pytest.approx(100 / 62.5, rel=1e-4)
    assert float(y2 - y1) == pytest.approx(625.0)


def test_decode_treats_groups_of_offsets_one_by_one():
    coder, boxes = BoxCoder(WEIGHTS), random_boxes(7)
    codes = torch.randn(7, 12, dtype=torch.float64)
    together = coder.decode_single(codes, boxes)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        assert torch.allclose(together[:, part], coder.decode_single(codes[:, part], boxes), atol=1e-12)


def test_decode_gives_full_precision_from_reduced_offsets():
    decoded = BoxCoder(WEIGHTS).decode_single(
        torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([[0, 0, 1001.0, 3]])
    )
    assert decoded.dtype == torch.float32
    assert decoded.tolist() == [[0, 0, 1001.0, 3]]


def test_decode_of_a_batch_keeps_images_apart_and_takes_none():
    coder = BoxCoder(WEIGHTS)
    boxes = [random_boxes(3), random_boxes(5)]
    codes = torch.randn(8, 8, dtype=torch.float64)
    decoded = coder.decode(codes, boxes)
    assert decoded.shape == (8, 2, 4)
    assert torch.equal(decoded[3:], coder.decode(codes[3:], boxes[1:]))
    assert coder.decode_single(torch.zeros(0, 8), torch.zeros(0, 4)).shape == (0, 8)


def test_coder_from_standard_deviations_divides_by_them():
    stds = (0.033, 0.05, 0.067, 0.2)
    reference, boxes = random_boxes(7), random_boxes(8)[:7]
    codes = BoxCoder.from_stds(stds).encode_single(boxes, reference)
    plain = BoxCoder((1.0, 1.0, 1.0, 1.0)).encode_single(boxes, reference)
    assert torch.allclose(codes, plain / torch.tensor(stds, dtype=torch.float64))
