import math

import pytest
import torch
from torchvision.ops import batched_nms

from swin_dense.errors import ConfigError
from swin_dense.heads.suppression import HardNMS, SoftNMS, keep_all

METHODS = pytest.mark.parametrize("method", ["linear", "gaussian"])


def crowd(count, num_classes=3, seed=0):
    """Boxes around a few places, so that most overlap some others; scores differ."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 3, (count, 2), generator=generator) * 37.0
    corner = centre + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 9
    sides = 17 + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 9
    scores = (torch.randperm(count, generator=generator).double() + 1) / (count + 1)
    labels = torch.randint(1, num_classes + 1, (count,), generator=generator)
    return torch.cat((corner, corner + sides), dim=1), scores, labels


def overlap(one, other):
    """IoU of two boxes, number by number."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (areas[0] + areas[1] - shared)


def literally(boxes, scores, labels, method, iou=0.5, sigma=0.5, min_score=1e-3):
    """The paper's figure 2, class by class, in plain Python; then all classes by falling score."""
    kept = []
    for label in set(labels.tolist()):
        left = {row: scores[row].item() for row in range(len(scores)) if labels[row] == label}
        while left:
            best = max(left, key=lambda row: left[row])
            score = left.pop(best)
            if score < min_score:
                break
            kept.append((score, best))
            for row in left:
                shared = overlap(boxes[best].tolist(), boxes[row].tolist())
                if method == "gaussian":
                    left[row] *= math.exp(-(shared**2) / sigma)
                elif shared >= iou:
                    left[row] *= 1 - shared
    kept.sort(reverse=True)
    return [row for _, row in kept], [score for score, _ in kept]


@METHODS
@pytest.mark.parametrize("seed", [0, 1])
def test_soft_nms_is_the_papers(method, seed):
    boxes, scores, labels = crowd(61, seed=seed)
    wanted_rows, wanted_scores = literally(boxes, scores, labels, method)
    rows, new_scores = SoftNMS(method)(boxes, scores, labels, 1000)
    assert rows.tolist() == wanted_rows and len(wanted_rows) > 30
    assert new_scores.tolist() == pytest.approx(wanted_scores, rel=1e-12)
    assert sum(new_scores < scores[rows]) > 10
    few_rows, few_scores = SoftNMS(method)(boxes, scores, labels, 7)
    assert torch.equal(few_rows, rows[:7]) and torch.equal(few_scores, new_scores[:7])


@METHODS
def test_soft_nms_changes_no_boxes_that_are_disjoint(method):
    scores = torch.tensor([0.3, 0.9, 0.2, 0.8])
    corners = torch.arange(4.0)[:, None] * 11
    boxes, labels = torch.cat((corners, corners, corners + 7, corners + 5), dim=1), torch.ones(4, dtype=torch.int64)
    rows, new_scores = SoftNMS(method)(boxes, scores, labels, 100)
    assert rows.tolist() == [1, 3, 0, 2] and torch.equal(new_scores, scores[rows])


@METHODS
def test_soft_nms_works_within_a_class(method):
    boxes, scores = torch.tensor([[1.0, 2, 30, 20]]).repeat(3, 1), torch.tensor([0.5, 0.9, 0.7])
    rows, new_scores = SoftNMS(method)(boxes, scores, torch.tensor([1, 2, 3]), 100)
    assert rows.tolist() == [1, 2, 0] and torch.equal(new_scores, scores[rows])


@METHODS
def test_soft_nms_does_not_depend_on_the_order_and_leaves_its_input(method):
    boxes, scores, labels = crowd(41)
    before = scores.clone()
    order = torch.randperm(41, generator=torch.Generator().manual_seed(3))
    rows, new_scores = SoftNMS(method)(boxes, scores, labels, 23)
    other_rows, other_scores = SoftNMS(method)(boxes[order], scores[order], labels[order], 23)
    assert torch.equal(order[other_rows], rows) and torch.equal(other_scores, new_scores)
    assert torch.equal(scores, before)


def test_soft_nms_drops_what_falls_below_the_least_score():
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]]), torch.ones(3, dtype=torch.int64)
    scores = torch.tensor([0.9, 0.8, 0.7])
    rows, new_scores = SoftNMS("linear")(boxes, scores, labels, 100)
    assert rows.tolist() == [0, 2] and new_scores.tolist() == pytest.approx([0.9, 0.07])
    assert SoftNMS("linear", min_score=0.08)(boxes, scores, labels, 100)[0].tolist() == [0]
    assert SoftNMS("linear", min_score=0.0)(boxes, scores, labels, 100)[0].tolist() == [0, 2, 1]


@METHODS
def test_soft_nms_takes_boxes_without_area_and_no_boxes(method):
    points, labels = torch.tensor([[3.0, 4, 3, 4]]).repeat(2, 1), torch.ones(2, dtype=torch.int64)
    rows, scores = SoftNMS(method)(points, torch.tensor([0.2, 0.4]), labels, 100)
    assert rows.tolist() == [1, 0] and scores.tolist() == pytest.approx([0.4, 0.2])
    rows, scores = SoftNMS(method)(torch.zeros(0, 4), torch.zeros(0), labels[:0], 100)
    assert rows.shape == scores.shape == (0,) and rows.dtype == torch.int64


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="method must be 'linear' or 'gaussian', got 'cubic'"):
        SoftNMS("cubic")


def test_hard_nms_is_torchvisions():
    boxes, scores, labels = crowd(61)
    wanted = batched_nms(boxes, scores, labels, 0.4)
    rows, same_scores = HardNMS(0.4)(boxes, scores, labels, 11)
    assert 11 < len(wanted) < 61 and torch.equal(rows, wanted[:11]) and torch.equal(same_scores, scores[rows])


def test_keep_all_keeps_all():
    boxes, scores, labels = crowd(13)
    rows, same_scores = keep_all(boxes, scores, labels, 5)
    assert rows.tolist() == list(range(13)) and torch.equal(same_scores, scores)
