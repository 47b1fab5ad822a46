import numpy as np
import pytest

from swin_dense.datasets.coco import read_annotations

NAN, INFINITY = float("nan"), float("inf")
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]


def read(tree):
    tree.write()
    return read_annotations(tree.annotation_file, tree.image_folder)


def test_a_good_file_has_no_fault_and_no_finding(coco_tree):
    content = read(coco_tree)
    assert content.faults == [] and content.findings == {}
    assert content.table.ids.tolist() == [11, 12, 15, 13, 14, 16]
    assert content.table.labels.tolist() == [1, 2, 0, 0, 2, 1]
    assert content.table.is_crowd.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [4, 6, INFINITY, 9]}, "width is not finite"),
        ({"bbox": [4, NAN, 20, 9]}, "y is not finite"),
        ({"bbox": [4, 6, -20, 9]}, "must not be negative"),
        ({"bbox": [4, 6, 20]}, "four numbers"),
        ({"bbox": ["4", 6, 20, 9]}, "bbox must hold numbers only"),
        ({"bbox": "4 6 20 9"}, "bbox must be a list"),
        ({"bbox": [67, 6, 20, 9]}, "lies outside the image of width 67 and height 41"),
        ({"bbox": [4, 1e9, 20, 9]}, "lies outside the image"),
        ({"category_id": 2}, r"category_id 2 is not among the categories \[1, 17, 90\]"),
        ({"category_id": "17"}, "category_id must be a whole number, got '17'"),
        ({"image_id": 4}, "image_id 4 is not among the images"),
        ({"image_id": 3.0}, r"image_id must be a whole number, got 3\.0"),
        ({"id": None}, "id must be a whole number, got None"),
        ({"id": True}, "id must be a whole number, got True"),
        ({"id": 2**70}, "id must be a whole number"),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1, got 2"),
        ({"ignore": "yes"}, "ignore must be 0 or 1, got 'yes'"),
        ({"ignore": 1, "segmentation": [], "bbox": None}, "needs a segmentation or a bbox, got neither"),
        ({"ignore": 0, "segmentation": []}, r"segmentation must be polygons or run lengths, got \[\]"),
        ({"area": NAN}, "area must be a finite number"),
        ({"area": "12"}, "area must hold numbers only"),
        ({"segmentation": None}, "segmentation must be polygons or run lengths, got None"),
        ({"segmentation": []}, r"segmentation must be polygons or run lengths, got \[\]"),
        ({"segmentation": [[]]}, "at least 3 points, got 0 numbers"),
        ({"segmentation": [[1, 1, 9, 9]]}, "at least 3 points, got 4 numbers"),
        ({"segmentation": [[*TRIANGLE, 3.0]]}, "x and y in turn of at least 3 points, got 7 numbers"),
        ({"segmentation": [[*TRIANGLE, NAN, 3.0]]}, "not finite or far outside"),
        ({"segmentation": [[NAN, *TRIANGLE, 3.0]]}, "not finite or far outside"),
        ({"segmentation": [[*TRIANGLE, 1e9, 3.0]]}, "not finite or far outside"),
        ({"segmentation": [[[1, 1], [9, 1], [9, 9]]]}, "segmentation must hold numbers only"),
        ({"segmentation": [7, TRIANGLE]}, "segmentation must hold numbers only"),
        (
            {"segmentation": {"size": [67, 41], "counts": [2747]}},
            r"image's .* \[41, 67\], got \[67, 41\]",
        ),
        ({"segmentation": {"size": [41, 67], "counts": [1, 2]}}, "height x width = 2747, got 3"),
        ({"segmentation": {"size": [41, 67], "counts": "~~~~"}}, "characters that"),
    ],
)
def test_faults_name_file_annotation_image_and_field(coco_tree, changes, message):
    annotation = coco_tree.content["annotations"][0]
    annotation.update(changes)
    content = read(coco_tree)
    assert len(content.faults) == 1
    fault = content.faults[0]
    assert fault.startswith(f"{coco_tree.annotation_file}: annotation id={annotation['id']!r} (image id=")
    if "image_id" not in changes:
        assert '(image id=3 "picture_0.png")' in fault
    assert fault.endswith("Correct the entry or remove it.")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault)


def test_an_entry_that_is_no_object_is_named_by_its_position(coco_tree):
    coco_tree.content["annotations"] += [7, {"image_id": 3}]
    faults = read(coco_tree).faults
    assert "annotations[6]: wanted an object" in faults[0] and "annotations[7]: id must be" in faults[1]


def test_every_fault_is_listed_and_repeated_ids_too(coco_tree):
    first, second = coco_tree.content["annotations"][:2]
    coco_tree.content["annotations"] += [{**first, "category_id": 5}, {**second}]
    faults = read(coco_tree).faults
    assert len(faults) == 2 and "repeated are [12]" in faults[1]


def test_missing_fields_are_filled_in_and_counted(coco_tree):
    expected = [annotation["bbox"] for annotation in coco_tree.content["annotations"]]
    for annotation in coco_tree.content["annotations"]:
        for field in ("bbox", "area", "iscrowd"):
            del annotation[field]
    content = read(coco_tree)
    assert content.faults == []
    assert np.array_equal(content.table.boxes_xywh, expected)
    assert not content.table.is_crowd.any() and np.isnan(content.table.areas).all()
    assert sorted(content.findings.values()) == [6, 6, 6]


def test_flat_polygon_is_one_polygon(coco_tree):
    nested = read(coco_tree).table
    coco_tree.content["annotations"][0]["segmentation"] = coco_tree.content["annotations"][0]["segmentation"][0]
    flat = read(coco_tree).table
    assert np.array_equal(nested.points, flat.points)


def test_odd_boxes_are_counted(coco_tree):
    first, second, third = coco_tree.content["annotations"][:3]
    first["bbox"] = [-2.0, 6.0, 26.0, 9.0]
    second["bbox"] = [30.0, 2.0, 0.0, 13.0]
    third["bbox"] = [40.0, 30.0, 27.5, 10.0]
    findings = read(coco_tree).findings
    assert findings["boxes partly outside (clipped)"] == 2
    assert findings["boxes under 1 px (not trained on)"] == 1
    assert findings["boxes that differ from their segmentation by over 2 px"] == 2


def test_corner_boxes_are_recognised(coco_tree):
    for annotation in coco_tree.content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]
    faults = read(coco_tree).faults
    assert any("fits its segmentation only as x1, y1, x2, y2" in fault for fault in faults)


def test_an_ignored_box_is_drawn_inside_the_image_however_far_it_reaches(coco_tree):
    annotation = coco_tree.content["annotations"][0]
    annotation.update(ignore=1, segmentation=None, bbox=[-1e9, 6, 2e9, 9])
    content = read(coco_tree)
    assert content.faults == [] and content.table.is_crowd.tolist() == [True, False, True, False, False, True]
    assert content.table.polygons(0)[0].tolist() == [0, 6, 67, 6, 67, 15, 0, 15]


def test_outlines_share_the_memory_of_the_table(coco_tree):
    table = read(coco_tree).table
    polygon, runs = table.outline(0), table.outline(3)
    assert np.shares_memory(polygon.polygons[0], table.points) and len(polygon.runs) == 0
    assert np.shares_memory(runs.runs, table.runs) and runs.polygons == ()
