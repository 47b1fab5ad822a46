from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from swin_dense.datasets.convert_objects import (
    ConvertedImage,
    coco_content,
    object_from_polygons,
    object_from_run_lengths,
    run_lengths_by_value,
)
from swin_dense.datasets.labels import LabelMap

MAPS = arrays.arrays(np.int32, st.tuples(st.integers(1, 13), st.integers(1, 11)), elements=st.integers(0, 4))


@settings(max_examples=60, deadline=None)
@given(MAPS)
def test_run_lengths_are_those_of_pycocotools_for_each_value(values):
    found = dict(run_lengths_by_value(values))
    assert list(found) == np.unique(values).tolist()
    for value, counts in found.items():
        mask = np.asfortranarray(values == value, np.uint8)
        code = coco_mask.encode(mask)
        each = object_from_run_lengths(2, counts, values.shape)
        assert each.segmentation == {"size": list(values.shape), "counts": code["counts"].decode()}
        assert list(each.box_xywh) == coco_mask.toBbox(code).tolist() and each.area == mask.sum() and each.label == 2


def test_run_lengths_keep_large_values():
    assert [value for value, _ in run_lengths_by_value(np.array([[70_000, 3], [3, 70_000]]))] == [3, 70_000]


def test_polygons_have_the_box_and_area_of_pycocotools():
    random = np.random.default_rng(0)
    for _ in range(20):
        polygons = [(random.random(2 * count) * 31).tolist() for count in (3, 7)]
        each = object_from_polygons(0, polygons, (29, 37))
        code = coco_mask.merge(coco_mask.frPyObjects(each.segmentation, 29, 37))
        assert each.area == coco_mask.area(code) and list(each.box_xywh) == coco_mask.toBbox(code).tolist()
        for written, polygon in zip(each.segmentation, polygons, strict=True):
            assert np.abs(np.array(written) - polygon).max() <= 5.1e-4


def test_polygon_without_a_pixel_is_none():
    assert object_from_polygons(0, [[3.0, 3.0, 3.0, 3.0, 3.0, 3.0]], (5, 7)) is None


def test_coco_content_numbers_from_1_and_writes_raw_ids():
    each = object_from_run_lengths(1, np.array([3, 2, 1]), (2, 3))
    images = [
        ConvertedImage(Path("x/b.png"), "b.png", (2, 3), ()),
        ConvertedImage(Path("a"), "a", (2, 3), (each, each)),
    ]
    content = coco_content(images, LabelMap(("cat", "dog"), (3, 90)))
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [(entry["id"], entry["image_id"], entry["category_id"]) for entry in content["annotations"]] == [
        (1, 2, 90),
        (2, 2, 90),
    ]
    assert content["categories"] == [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]
    assert content["images"][0] == {"id": 1, "file_name": "b.png", "height": 2, "width": 3}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_run_lengths_fill_thin_pictures(shape):
    (value, counts), *rest = run_lengths_by_value(np.full(shape, 5))
    assert value == 5 and counts.tolist() == [0, np.prod(shape)] and not rest
