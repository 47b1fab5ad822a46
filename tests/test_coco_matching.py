import sys
import types

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from swin_dense.datasets.coco_matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    KINDS,
    MAX_DETECTIONS,
    Detections,
    best_of_each_class,
    is_ignored,
    match,
    match_image,
)
from swin_dense.datasets.coco_objects import ImageObjects

RANGES = np.array(list(AREA_RANGES.values()))


def objects_of(areas, is_crowd, labels=None, boxes_xywh=None, masks=()):
    count = len(areas)
    return ImageObjects(
        image_id=0,
        size_hw=(37, 53),
        rows=np.arange(count),
        labels=np.zeros(count, np.int64) if labels is None else np.array(labels),
        boxes_xywh=np.zeros((count, 4)) if boxes_xywh is None else np.array(boxes_xywh, float),
        areas=np.array(areas, float),
        is_crowd=np.array(is_crowd, bool),
        segmentations=masks or [None] * count,
    )


def rectangle(left, top, width, height, size_hw=(37, 53)):
    mask = np.zeros(size_hw, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return coco_mask.encode(np.asfortranarray(mask))


def pycocotools_of(ious, areas, is_crowd, detection_areas):
    """COCOeval.evaluateImg on a table of overlaps: found an object, to be ignored; both (A, T, D)."""
    evaluation = COCOeval(iouType="bbox")
    evaluation._gts[0, 0] = [
        {"id": row + 1, "ignore": int(crowd), "iscrowd": int(crowd), "area": area}
        for row, (area, crowd) in enumerate(zip(areas, is_crowd, strict=True))
    ]
    evaluation._dts[0, 0] = [{"id": row + 1, "score": 0.5, "area": area} for row, area in enumerate(detection_areas)]
    evaluation.ious = {(0, 0): ious if ious.size else []}
    found = [evaluation.evaluateImg(0, 0, area_range, MAX_DETECTIONS[-1]) for area_range in RANGES]
    return np.stack([each["dtMatches"] > 0 for each in found]), np.stack([each["dtIgnore"] for each in found])


@pytest.mark.parametrize("seed", range(40))
def test_match_image_equals_pycocotools_on_tables_full_of_ties(seed):
    random = np.random.default_rng(seed)
    num_detections, num_objects = random.integers(1, 17), random.integers(0, 9)
    ious = random.choice([0.0, 0.4, 0.5, 0.55, 0.8, 0.9, 0.95, 1.0], (num_detections, num_objects))
    sizes = [0.0, 100.0, 1024.0, 1025.0, 9216.0, 9217.0, 1e10, 2e10]
    areas, detection_areas = random.choice(sizes, num_objects), random.choice(sizes, num_detections)
    is_crowd = random.random(num_objects) < 0.3
    kind = type(KINDS["box"])(lambda *_: ious, lambda _: detection_areas, needs_masks=False)
    detections = Detections(np.zeros(num_detections, int), np.full(num_detections, 0.5), np.zeros((num_detections, 4)))
    is_matched, is_neutral = match_image(kind, detections, objects_of(areas, is_crowd))
    expected_matched, expected_neutral = pycocotools_of(ious, areas, is_crowd, detection_areas)
    assert np.array_equal(is_matched, expected_matched) and np.array_equal(is_neutral, expected_neutral)


def test_axes_are_those_of_pycocotools():
    params = COCOeval(iouType="segm").params
    assert np.array_equal(IOU_THRESHOLDS, params.iouThrs) and np.array_equal(RANGES, params.areaRng)
    assert list(AREA_RANGES) == params.areaRngLbl and list(MAX_DETECTIONS) == params.maxDets


def test_an_object_is_taken_once_and_a_crowd_region_again_and_again():
    ious = np.array([[0.9, 0.0], [0.9, 0.9], [0.9, 0.9]])
    ignored = np.tile([False, True], (len(AREA_RANGES), 1))
    is_matched, on_ignored = match(ious, ignored, is_crowd=np.array([False, True]))
    assert is_matched[0, 0].tolist() == [True, True, True] and on_ignored[0, 0].tolist() == [False, True, True]
    is_matched, on_ignored = match(ious, ignored, is_crowd=np.array([False, False]))
    assert is_matched[0, 0].tolist() == [True, True, False] and on_ignored[0, 0].tolist() == [False, True, False]


def test_classes_are_matched_apart():
    boxes = [[1, 2, 11, 7], [1, 2, 11, 7]]
    objects = objects_of([77, 77], [False, False], labels=[0, 1], boxes_xywh=boxes)
    detections = Detections(np.array([1, 1, 2]), np.ones(3), np.array([boxes[0]] * 3, float))
    is_matched, is_neutral = match_image(KINDS["box"], detections, objects)
    assert is_matched[0, -1].tolist() == [True, False, False] and not is_neutral[0].any()


def test_objects_at_the_edge_of_two_sizes_count_in_both():
    ignored = is_ignored(objects_of([1024, 9216, 0, 1e10, 2e10, 50], [False] * 5 + [True]))
    counted = {name: np.flatnonzero(~row).tolist() for name, row in zip(AREA_RANGES, ignored, strict=True)}
    assert counted == {"all": [0, 1, 2, 3], "small": [0, 2], "medium": [0, 1], "large": [1, 3]}


@pytest.mark.parametrize("seed", range(5))
def test_best_of_each_class_are_the_first_hundred_of_a_stable_order(seed):
    random = np.random.default_rng(seed)
    labels, scores = random.choice([0, 3, 4], 331, p=[0.7, 0.2, 0.1]), random.integers(-5, 5, 331) / 4
    rows, ranks = best_of_each_class(labels, scores)
    for label in range(5):
        own = np.flatnonzero(labels == label)
        expected = own[np.argsort(-scores[own], kind="mergesort")][:100]
        assert rows[labels[rows] == label].tolist() == expected.tolist()
        assert ranks[labels[rows] == label].tolist() == list(range(len(expected)))


def test_boundary_overlap_is_the_least_of_both_and_that_of_the_mask_for_crowds(monkeypatch):
    def upper_half(rle):
        mask = coco_mask.decode(rle)
        mask[15:] = 0
        return coco_mask.encode(np.asfortranarray(mask))

    stand_in = types.ModuleType("boundaries")
    monkeypatch.setattr(stand_in, "boundary_rle", upper_half, raising=False)
    monkeypatch.setitem(sys.modules, "swin_dense.datasets.boundaries", stand_in)
    masks = [rectangle(3, 5, 20, 20), rectangle(3, 5, 20, 20), rectangle(3, 11, 20, 20)]
    found = [rectangle(3, 7, 20, 20), rectangle(30, 7, 20, 20)]
    objects = objects_of([400] * 3, [False, True, False], masks=masks)
    detections = Detections(np.zeros(2, int), np.ones(2), np.zeros((2, 4)), found, coco_mask.area(found))
    whole = KINDS["mask"].ious(detections, objects, np.arange(3))
    upper = coco_mask.iou([upper_half(mask) for mask in found], [upper_half(mask) for mask in masks], [0, 0, 0])
    assert (upper[0, [0, 2]] < whole[0, [0, 2]]).all()
    expected = np.stack([upper[:, 0], whole[:, 1], upper[:, 2]], axis=1)
    assert np.array_equal(KINDS["boundary"].ious(detections, objects, np.arange(3)), expected)
    only_crowd = np.array([1])
    assert np.array_equal(KINDS["boundary"].ious(detections, objects, only_crowd), whole[:, only_crowd])
