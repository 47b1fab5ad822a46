import numpy as np
import pytest

from swin_dense.datasets.instance_facts import AS_GIVEN, InstanceFacts
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

LABELS = LabelMap(names=("cat", "dog", "cow"), raw_ids=(3, 5, 8))
SIZE_HW = (67, 89)


def random_image(seed, num_objects=5):
    """Arguments of `add`: boxes on most of the objects, some of them ignored."""
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 30, (num_objects, 2))
    objects = np.concatenate([corners, corners + random.uniform(9, 37, (num_objects, 2))], axis=1)
    object_labels = random.integers(0, 3, num_objects)
    chosen = random.integers(0, num_objects, 7)
    boxes = objects[chosen] + random.normal(0, 2, (7, 4))
    labels = np.where(random.random(7) < 0.6, object_labels[chosen], random.integers(0, 3, 7))
    return boxes, random.random(7), labels, objects, object_labels, random.random(num_objects) < 0.3, SIZE_HW


def gathered(*images):
    facts = InstanceFacts(LABELS)
    for image in images:
        facts.add(*image)
    return facts


def values_of(facts):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(facts).items()}


def intersection_over_union(one, other):
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = sides.clip(0).prod()
    return shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared)


def test_facts_equal_counting_one_by_one():
    images = [random_image(seed) for seed in range(13)]
    facts = gathered(*images)
    covered, shifted, best = 0, {-1: 0, 0: 0, 1: 0}, np.zeros(3)
    for boxes, _, labels, objects, object_labels, ignored, _ in images:
        for box, label in zip(objects[~ignored], object_labels[~ignored], strict=True):
            ious = np.array([intersection_over_union(each, box) for each in boxes])
            covered += (ious >= 0.5).any()
            for shift in shifted:
                shifted[shift] += (ious[labels == label + shift] >= 0.5).any()
            best[label] = max(best[label], ious[labels == label].max(initial=0))
    assert facts.covered[AS_GIVEN] == covered and facts.covered_by_shift == shifted
    assert facts.best_iou_of_class == pytest.approx(best)
    assert facts.num_detections == 13 * 7 and facts.num_images == 13 and facts.images_without_detections == 0
    for index in range(3):
        assert facts.detections_of_class[index] == sum((image[2] == index).sum() for image in images)
        assert facts.objects_of_class[index] == sum((image[4][~image[5]] == index).sum() for image in images)
    assert facts.num_objects + facts.num_ignored_regions == 13 * 5
    assert facts.lowest_score == min(image[1].min() for image in images)
    assert facts.highest_score == max(image[1].max() for image in images)


def test_merging_is_gathering_together():
    images = [random_image(seed) for seed in range(11)]
    one, other = gathered(*images[::2]), gathered(*images[1::2])
    one.unknown_image_ids, other.unknown_image_ids = {1, 2}, {2, "a"}
    other.unknown_category_ids = {7}
    other.merge(one)
    whole = gathered(*reversed(images))
    whole.unknown_image_ids, whole.unknown_category_ids = {1, 2, "a"}, {7}
    assert values_of(other) == values_of(whole)
    with pytest.raises(DataError, match=r"The classes differ: .*'cat'.*'sheep'"):
        one.merge(InstanceFacts(LabelMap(("sheep",), (1,))))


def written(form, boxes_xyxy):
    left, top, right, bottom = boxes_xyxy.T
    width, height = right - left, bottom - top
    return np.stack(
        {
            "x1, y1, x2, y2": (left, top, right, bottom),
            "x, y, width, height": (left, top, width, height),
            "centre x, centre y, width, height": (left + width / 2, top + height / 2, width, height),
            "y1, x1, y2, x2": (top, left, bottom, right),
        }[form],
        axis=1,
    )


@pytest.mark.parametrize("unit", ["in pixels", "in fractions of the image's width and height"])
@pytest.mark.parametrize(
    "form", ["x1, y1, x2, y2", "x, y, width, height", "centre x, centre y, width, height", "y1, x1, y2, x2"]
)
def test_the_way_boxes_are_written_covers_every_object(form, unit):
    # Far from the diagonal and from each other, so that no other way fits.
    objects = np.array([[60.0, 3, 84, 12], [50, 40, 80, 47]])
    scaled = objects if unit == "in pixels" else objects / np.tile((SIZE_HW[1], SIZE_HW[0]), 2)
    labels, none = np.zeros(2, int), np.zeros(2, bool)
    facts = gathered((written(form, scaled), np.array([0.5, 0.6]), labels, objects, labels, none, SIZE_HW))
    assert {reading for reading, count in facts.covered.items() if count} == {f"{form} {unit}"}
    assert facts.covered[f"{form} {unit}"] == 2


def test_detections_in_ignored_regions_are_counted_unless_an_object_explains_them():
    objects = np.array([[0.0, 0, 60, 60], [10, 10, 20, 20]])
    boxes = np.array([[30.0, 30, 40, 40], [10, 10, 20, 20], [30, 30, 40, 40], [70, 10, 80, 20]])
    ignored, scores = np.array([True, False]), np.full(4, 0.5)
    facts = gathered((boxes, scores, np.array([0, 0, 1, 0]), objects, np.array([0, 0]), ignored, SIZE_HW))
    assert facts.in_ignored_regions == 1 and facts.num_ignored_regions == 1 and facts.num_objects == 1


def test_boxes_beyond_their_image_are_counted_from_a_pixel_on():
    boxes = np.array([[-0.9, 0, 5, 5], [-1.1, 0, 5, 5], [0, 0, 89.9, 67.9], [0, 0, 5, 68.1]])
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool)
    facts = gathered((boxes, np.full(4, 0.5), np.zeros(4, int), *none, SIZE_HW))
    assert facts.beyond_image == 2


def test_what_is_not_finite_counts_nowhere_else():
    boxes, scores, labels, *rest = random_image(0)
    boxes, scores = boxes.copy(), scores.copy()
    kept = np.arange(7) > 1
    boxes[0, 2], scores[1] = np.nan, np.inf
    facts, of_rest = (
        gathered((boxes, scores, labels, *rest)),
        gathered((boxes[kept], scores[kept], labels[kept], *rest)),
    )
    assert facts.not_finite == 2 and facts.num_detections == 7
    facts.not_finite, facts.num_detections = 0, 5
    assert values_of(facts) == values_of(of_rest)


@pytest.mark.parametrize("side", [0.0, 0.1, 1.0, 13.0, 700.0, 1e9])
def test_median_sides_are_exact_to_a_tenth(side):
    random = np.random.default_rng(3)
    sides = side * np.array([0.1, 1, 1, 1, 10])
    corners = random.uniform(0, 9, (5, 2))
    objects = np.concatenate([corners, corners + sides[:, None] * [2, 0.5]], axis=1)
    zeros, none = np.zeros(5, int), np.zeros(5, bool)
    facts = gathered((objects, np.full(5, 0.5), zeros, objects, zeros, none, SIZE_HW))
    expected = np.clip(side, 2.0**-4, 2.0**15.75)
    assert facts.median_sides == pytest.approx((expected, expected), rel=0.1)


def test_images_without_detections_or_objects_are_facts_too():
    boxes, scores, labels, objects, object_labels, ignored, _ = random_image(0)
    no_boxes = np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)
    no_objects = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool)
    facts = gathered(
        (*no_boxes, objects, object_labels, ignored, SIZE_HW),
        (boxes, scores, labels, *no_objects, SIZE_HW),
        (*no_boxes, *no_objects, SIZE_HW),
    )
    assert (facts.num_images, facts.images_without_detections, facts.num_detections) == (3, 2, 7)
    assert sum(facts.covered.values()) == 0
