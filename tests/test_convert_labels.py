import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from swin_dense.datasets.convert_findings import Findings
from swin_dense.datasets.convert_labels import drawing_rule, read_coco_labels
from swin_dense.datasets.labels import LabelMap
from swin_dense.errors import AnnotationError, ConfigError

CATEGORIES = LabelMap(("dog", "cat", "cup"), (1, 17, 90))


def read(tree, findings=None, **options):
    findings = findings or Findings()
    label_map, labels = read_coco_labels(
        tree.annotation_file, tree.image_folder, lambda categories: drawing_rule(categories, **options), findings
    )
    return label_map, {label.path.name: label.values for label in labels}


def masks_by_category(tree, image_id):
    coco = COCO(tree.annotation_file)
    return {entry["category_id"]: coco.annToMask(entry).astype(bool) for entry in coco.imgToAnns[image_id]}


@pytest.mark.parametrize(
    ("options", "names", "values", "outside"),
    [
        ({}, ("background", "dog", "cat", "cup"), (1, 2, 3), 0),
        ({"uncovered": "ignore"}, ("dog", "cat", "cup"), (0, 1, 2), 255),
    ],
)
def test_values_follow_the_order_of_ids(options, names, values, outside):
    rule = drawing_rule(CATEGORIES, **options)
    assert rule.label_map == LabelMap(names, tuple(range(len(names))))
    assert rule.values == values and rule.uncovered == outside and rule.crowd == 255


def test_raw_ids_keep_their_values_and_gaps_become_unused_classes():
    rule = drawing_rule(CATEGORIES, values="ids", uncovered="ignore")
    assert rule.values == (1, 17, 90) and rule.label_map.raw_ids == tuple(range(1, 91))
    assert [rule.label_map.names[value - 1] for value in (1, 2, 17, 90)] == ["dog", "unused 2", "cat", "cup"]
    assert drawing_rule(CATEGORIES, values="ids").label_map.names[:2] == ("background", "dog")


@pytest.mark.parametrize(
    ("categories", "options", "message"),
    [
        (LabelMap(("a",), (0,)), {"values": "ids"}, "category 'a' has the id 0, the background's value"),
        (
            LabelMap(("a", "b"), (1, 255)),
            {"values": "ids"},
            "classes from 0 to 254, the categories' values go from 1 to",
        ),
        (LabelMap(("a",), (-1,)), {"values": "ids", "uncovered": "ignore"}, "go from -1 to -1; pass --values order"),
        (LabelMap(("background",), (1,)), {}, "a category is called 'background' already"),
        (CATEGORIES, {"uncovered": "ignore", "crowds": "background"}, "needs --uncovered background"),
    ],
)
def test_categories_that_do_not_fit_are_refused(categories, options, message):
    with pytest.raises(ConfigError, match=message):
        drawing_rule(categories, **options)


def test_pixels_get_the_value_of_their_object(coco_tree):
    _, labels = read(coco_tree)
    masks = masks_by_category(coco_tree, 3)
    expected = np.zeros((41, 67), np.uint8)
    expected[masks[1]] = 255  # the crowd
    expected[masks[17]], expected[masks[90]] = 2, 3
    assert np.array_equal(labels["picture_0.png"], expected)
    assert set(labels) == {f"picture_{number}.png" for number in range(4)}
    assert not labels["picture_3.png"].any() and (labels["picture_2.png"] == 255).all()


def test_crowds_become_what_is_asked(coco_tree):
    crowd = masks_by_category(coco_tree, 3)[1]
    for crowds, value in (("ignore", 255), ("background", 0), ("class", 1)):
        assert (read(coco_tree, crowds=crowds)[1]["picture_0.png"][crowd] == value).all()


def test_smaller_objects_or_later_ones_are_on_top_and_crowds_below(coco_tree):
    square = [[2.0, 2.0, 30.0, 2.0, 30.0, 30.0, 2.0, 30.0]]
    small = [[10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]]
    base = {"image_id": 3, "bbox": [2.0, 2.0, 28.0, 28.0], "area": 1.0}
    coco_tree.content["annotations"] = [
        {**base, "id": 1, "category_id": 17, "segmentation": small, "bbox": [10.0, 10.0, 10.0, 10.0], "iscrowd": 0},
        {**base, "id": 2, "category_id": 90, "segmentation": square, "iscrowd": 0},
        {**base, "id": 3, "category_id": 1, "segmentation": {"size": [41, 67], "counts": [0, 41 * 67]}, "iscrowd": 1},
    ]
    coco_tree.write()
    findings = Findings()
    assert read(coco_tree, findings)[1]["picture_0.png"][15, 15] == 2  # by the mask, whatever area says
    assert findings.notes == {"pixels that more than one object claims": 100}
    by_file = read(coco_tree, order="file")[1]["picture_0.png"]
    assert by_file[15, 15] == 3 and by_file[35, 50] == 255


def test_folders_in_names_are_flattened_and_twins_are_faults(coco_tree):
    folder = coco_tree.image_folder / "city"
    folder.mkdir()
    (coco_tree.image_folder / "picture_0.png").rename(folder / "picture_0.png")
    coco_tree.content["images"][0]["file_name"] = "city/picture_0.png"
    Image.new("RGB", (37, 59)).save(coco_tree.image_folder / "city_picture_0.png")
    coco_tree.content["images"][1]["file_name"] = "city_picture_0.png"
    coco_tree.write()
    findings = Findings()
    read(coco_tree, findings)
    assert findings.faults == [
        "images 'city/picture_0.png' and 'city_picture_0.png' would have the same label picture. Rename one."
    ]


def test_every_fault_of_annotations_and_images_is_told(coco_tree):
    coco_tree.content["annotations"][0]["category_id"] = 5
    coco_tree.content["annotations"][1]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    coco_tree.content["images"][1]["height"] = 60
    coco_tree.content["annotations"][3]["segmentation"] = {"size": [60, 37], "counts": [0, 60 * 37]}
    (coco_tree.image_folder / "picture_2.png").unlink()
    coco_tree.write()
    findings = Findings()
    read(coco_tree, findings)
    assert len(findings.faults) == 4
    for fault, text in zip(
        findings.faults,
        (
            "category_id 5 is not",
            "at least 3 points, got 4",
            "60 x 37, the picture is 59 x 37",
            "picture_2.png: there is",
        ),
        strict=True,
    ):
        assert text in fault


def test_file_that_is_no_coco_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(AnnotationError, match=r"a\.json: wanted a COCO annotation file"):
        read_coco_labels(tmp_path / "a.json", tmp_path, drawing_rule, Findings())
