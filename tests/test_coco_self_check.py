import copy

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from swin_dense.datasets import coco_matching
from swin_dense.datasets.coco_matching import Kind
from swin_dense.datasets.coco_self_check import require_perfect_score
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import DataError

LABELS = LabelMap(names=("cup", "dog", "owl"), raw_ids=(90, 0, 4))
SIZE_HW = (59, 83)


def rectangle(left, top, width, height):
    mask = np.zeros(SIZE_HW, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return {"size": list(SIZE_HW), "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}


def annotation(number, image_id, category_id, box, **more):
    left, top, width, height = box
    segmentation = rectangle(left, top, width, height)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(side) for side in box],
        "segmentation": segmentation,
        **more,
    }


@pytest.fixture
def truth():
    """Duplicates, overlaps, crowds over objects, ids from 0, an image and a class without objects."""
    boxes = [(3, 5, 17, 19), (3, 5, 17, 19), (4, 5, 17, 19), (30, 30, 7, 11), (31, 31, 1, 1)]
    annotations = [annotation(number, 0, (90, 0)[number % 2], box) for number, box in enumerate(boxes)]
    annotations += [annotation(10 + number, 8, 0, box, area=1024) for number, box in enumerate(boxes)]
    annotations += [annotation(20, 8, 0, (0, 0, 83, 59), iscrowd=1), annotation(21, 0, 90, (0, 0, 50, 50), ignore=1)]
    return {
        "images": [{"id": image_id, "height": SIZE_HW[0], "width": SIZE_HW[1]} for image_id in (8, 0, 3)],
        "categories": [{"id": raw_id, "name": name} for name, raw_id in zip(LABELS.names, LABELS.raw_ids, strict=True)],
        "annotations": annotations,
    }


def test_a_sound_ground_truth_scores_one_in_every_kind_without_a_note(truth):
    before = copy.deepcopy(truth)
    assert require_perfect_score(truth, LABELS, ("box", "mask", "boundary")) == []
    assert truth == before


def test_objects_without_extent_are_told_not_refused(truth):
    truth["annotations"][4].update(bbox=[31.0, 31.0, 0.0, 1.0])
    truth["annotations"].append(annotation(30, 3, 4, (5, 5, 0, 0)) | {"bbox": [5.0, 5.0, 9.0, 9.0]})
    notes = require_perfect_score(truth, LABELS)
    assert notes == [
        "Objects without extent: 2, annotation ids 4, 30. No detection can ever match them, so each counts as missed."
    ]
    assert "Objects without extent: 1, annotation ids 4." in require_perfect_score(truth, LABELS, ("box",))[0]


def test_more_than_a_hundred_of_a_class_are_told_not_refused(truth):
    boxes = [(x, y, 5, 5) for x in range(0, 77, 6) for y in range(0, 53, 6)]
    truth["annotations"] += [annotation(100 + number, 3, 4, box) for number, box in enumerate(boxes)]
    assert len(boxes) == 117
    assert require_perfect_score(truth, LABELS) == [
        "Images with more than 100 objects of one class: 1, ids 3. COCO scores no more detections than that, so 17 "
        "objects count as missed."
    ]


def test_objects_without_segmentation_are_refused_where_masks_are_to_be_scored(truth):
    del truth["annotations"][7]["segmentation"]
    with pytest.raises(DataError, match="An object of image 8 has no segmentation"):
        require_perfect_score(truth, LABELS)
    assert require_perfect_score(truth, LABELS, ["box"]) == []


def test_a_kind_that_does_not_recognise_an_object_is_found_out(truth, monkeypatch):
    box = coco_matching.KINDS["box"]

    def blind(detections, objects, rows):
        return box.ious(detections, objects, rows) * (detections.boxes_xywh[:, 2:3] > 1)

    monkeypatch.setitem(coco_matching.KINDS, "box", Kind(blind, box.areas, needs_masks=False))
    message = (
        r"class 'cup' has a box AP of 0\.\d+\. "
        "In image 0, the annotation ids 4 do not match themselves. Look at their box."
    )
    with pytest.raises(DataError, match=message):
        require_perfect_score(truth, LABELS, ["mask", "box"])


def test_objects_that_get_in_each_others_way_are_found_out(truth, monkeypatch):
    mask = coco_matching.KINDS["mask"]

    def confused(detections, objects, rows):
        return mask.ious(detections, objects, rows) * (1 if len(rows) == 1 else 0.4)

    monkeypatch.setitem(coco_matching.KINDS, "mask", Kind(confused, mask.areas, needs_masks=True))
    with pytest.raises(DataError, match=r"annotation ids .* match themselves one by one, but not together"):
        require_perfect_score(truth, LABELS)
