import copy

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from swin_dense.datasets.coco_objects import objects_by_image
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, DataError

LABELS = LabelMap(names=("cup", "dog"), raw_ids=(90, 0))
TRIANGLE = [[3.0, 5.0, 20.5, 5.0, 11.0, 27.25]]
RUNS = {"size": [31, 47], "counts": [100, 7, 31 * 47 - 107]}
TEXT = {"size": [31, 47], "counts": coco_mask.frPyObjects(RUNS, 31, 47)["counts"].decode()}


@pytest.fixture
def truth():
    return {
        "images": [{"id": 7, "height": 31, "width": 47}, {"id": 0, "height": 37, "width": 23}],
        "categories": [{"id": 0, "name": "dog"}, {"id": 90, "name": "cup"}],
        "annotations": [
            {"id": 0, "image_id": 7, "category_id": 0, "bbox": [3, 5, 17, 22], "area": 9.5, "segmentation": TRIANGLE},
            {"id": 0, "image_id": 7, "category_id": 90, "segmentation": RUNS, "ignore": 1, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 90, "segmentation": TEXT, "iscrowd": 1, "area": 3},
            {"id": 6, "image_id": 7, "category_id": 90, "bbox": [40.0, 20.0, 90.0, 5.0], "iscrowd": 1},
        ],
    }


def test_objects_keep_the_order_of_the_file_and_ids_play_no_part(truth):
    before = copy.deepcopy(truth)
    objects = objects_by_image(truth, LABELS)
    assert list(objects) == [7, 0] and len(objects[0]) == 0 and objects[0].boxes_xywh.shape == (0, 4)
    assert objects[7].rows.tolist() == [0, 1, 2, 3] and objects[7].labels.tolist() == [1, 0, 0, 0]
    assert objects[7].is_crowd.tolist() == [False, True, True, True] and objects[7].size_hw == (31, 47)
    assert truth == before


def test_missing_areas_and_boxes_are_those_of_the_mask(truth):
    objects = objects_by_image(truth, LABELS)[7]
    assert objects.areas.tolist() == [9.5, 7.0, 3.0, 450.0]
    assert objects.boxes_xywh[1].tolist() == coco_mask.toBbox(coco_mask.frPyObjects(RUNS, 31, 47)).tolist()


def test_masks_are_drawn_as_by_pycocotools_and_a_region_without_one_is_its_box(truth):
    coco = COCO()
    coco.imgs = {image["id"]: image for image in truth["images"]}
    masks = objects_by_image(truth, LABELS)[7].masks
    for mask, annotation in zip(masks[:3], truth["annotations"], strict=False):
        assert np.array_equal(coco_mask.decode(mask), coco.annToMask(annotation))
    box = np.zeros((31, 47))
    box[20:25, 40:] = 1
    assert np.array_equal(coco_mask.decode(masks[3]), box)


def test_only_objects_need_masks(truth):
    assert not objects_by_image(truth, LABELS)[7].lacks_masks
    truth["annotations"][0]["segmentation"] = []
    assert objects_by_image(truth, LABELS)[7].lacks_masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "Annotation 0 of image 8 is of an image that is not among the 2 images"),
        ({"category_id": 1}, r"Annotation 0 of image 7: category_id 1 is not among \[90, 0\]"),
        ({"bbox": [1, 2, float("inf"), 4]}, "Annotation 0 of image 7: wanted a bbox of four finite numbers"),
        ({"bbox": [1, 2, 3]}, "wanted a bbox of four finite numbers"),
        ({"area": float("nan")}, "and a finite area, got .*nan"),
        ({"bbox": None, "segmentation": None}, "Annotation 0 of image 7 has neither a segmentation nor a box"),
    ],
)
def test_annotations_that_cannot_be_scored_are_named(truth, change, message):
    truth["annotations"][0].update(change)
    with pytest.raises(DataError, match=message):
        objects_by_image(truth, LABELS)


@pytest.mark.parametrize(
    "segmentation", [[[1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]], {"size": [31, 47], "counts": "zz"}]
)
def test_segmentations_that_would_crash_pycocotools_are_refused(truth, segmentation):
    truth["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(AnnotationError, match=r"An object of image 7: (segmentation|counts)"):
        _ = objects_by_image(truth, LABELS)[7].masks
    del truth["annotations"][0]["area"]
    with pytest.raises(AnnotationError, match="An object of image 7"):
        objects_by_image(truth, LABELS)


def test_sections_must_be_there(truth):
    with pytest.raises(DataError, match="The ground truth has no annotations"):
        objects_by_image({key: value for key, value in truth.items() if key != "annotations"}, LABELS)
    with pytest.raises(DataError, match="The ground truth has no images"):
        objects_by_image({**truth, "images": []}, LABELS)
