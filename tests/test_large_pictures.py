import numpy as np
import pytest
from pycocotools import mask as coco_mask

from swin_dense.datasets.drawing import draw_instances, draw_semantic
from swin_dense.datasets.labels import LabelMap
from swin_dense.tools import large_pictures
from swin_dense.tools.instance_prediction import InstancePrediction
from swin_dense.tools.large_pictures import draw_large_instances, draw_large_semantic

LABELS = LabelMap(("cat", "dog", "cup"), (1, 2, 3))
STEP = 3


@pytest.fixture(autouse=True)
def pictures_of_400_pixels(monkeypatch):
    monkeypatch.setattr(large_pictures, "LONGEST_SIDE", 400)


def enlarged(values):
    """Each pixel as a square, and a rim that the picture leaves out."""
    padding = ((0, 2), (0, 1), *((0, 0),) * (values.ndim - 2))
    return np.pad(values.repeat(STEP, axis=0).repeat(STEP, axis=1), padding)


@pytest.fixture
def small():
    return np.random.default_rng(0).integers(0, 256, (330, 390, 3), dtype=np.uint8)


def objects(count, size_hw, seed=0):
    generator = np.random.default_rng(seed)
    masks, boxes = np.zeros((count, *size_hw), np.uint8), np.zeros((count, 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        y, x = (int(generator.integers(side - 40)) for side in size_hw)
        height, width = generator.integers(5, 40, 2)
        mask[y : y + height, x : x + width] = generator.random((height, width)) < 0.8
        box[:] = x, y, x + width, y + height
    return masks, boxes


def test_semantic_picture_is_that_of_the_reduced_image(small):
    label = np.random.default_rng(1).integers(0, 3, (330, 390), dtype=np.uint8)
    drawn = draw_large_semantic(enlarged(small), enlarged(label), LABELS)
    assert np.array_equal(drawn, draw_semantic(small, label, LABELS, scale=1))


def encoded(masks):
    codes = [coco_mask.encode(np.asfortranarray(enlarged(mask))) for mask in masks]
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in codes]


def test_instance_picture_is_that_of_the_reduced_image(small):
    masks, boxes = objects(9, (330, 390))
    labels, scores = np.arange(9) % 3, np.linspace(0.9, 0.5, 9).astype(np.float32)
    image = enlarged(small)
    before = image.copy()
    drawn = draw_large_instances(image, InstancePrediction(boxes * STEP, labels, scores, encoded(masks)), LABELS)
    names = [LABELS.names[label] for label in labels]
    assert np.array_equal(drawn, draw_instances(small, boxes, names, masks, scores, label_map=LABELS, scale=1))
    assert np.array_equal(image, before)


def test_many_objects_are_drawn_as_their_classes(small, monkeypatch):
    monkeypatch.setattr(large_pictures, "NAMED_OBJECTS", 8)
    masks, boxes = objects(9, (330, 390))
    labels = np.arange(9) % 3
    found = InstancePrediction(boxes * STEP, labels, np.ones(9, np.float32), encoded(masks))
    classes = np.full((330, 390), 255, np.uint8)
    for row in np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable"):
        classes[masks[row] == 1] = labels[row]
    assert np.array_equal(draw_large_instances(enlarged(small), found, LABELS), draw_semantic(small, classes, LABELS))


def test_of_many_classes_the_best_objects_are_drawn(small, monkeypatch):
    monkeypatch.setattr(large_pictures, "NAMED_OBJECTS", 4)
    many = LabelMap(tuple(f"class {number}" for number in range(300)), tuple(range(300)))
    masks, boxes = objects(9, (330, 390))
    found = InstancePrediction(boxes * STEP, np.arange(9) * 30, np.ones(9, np.float32), encoded(masks))
    best = found.select(np.arange(4))
    drawn = [draw_large_instances(enlarged(small), prediction, many) for prediction in (found, best)]
    assert np.array_equal(*drawn) and drawn[0].shape == small.shape


def test_nothing_found_is_the_reduced_image(small):
    nothing = InstancePrediction(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])
    assert np.array_equal(draw_large_instances(enlarged(small), nothing, LABELS), small)


def test_image_that_fits_is_not_reduced(small):
    label = np.random.default_rng(1).integers(0, 3, (330, 390), dtype=np.uint8)
    assert np.array_equal(draw_large_semantic(small, label, LABELS), draw_semantic(small, label, LABELS, scale=1))


def test_very_long_image_keeps_a_pixel_of_its_short_side():
    image = np.full((2, 4000, 3), 7, np.uint8)
    assert draw_large_semantic(image, np.zeros((2, 4000), np.uint8), LABELS).shape[1] == 400
