import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.check_coco import check_coco
from swin_dense.datasets.check_drawing import draw_finding
from swin_dense.datasets.check_findings import Finding
from swin_dense.datasets.check_semantic import check_semantic, find_semantic_folders
from swin_dense.datasets.labels import LabelMap

RED, YELLOW, GREY, MAGENTA = (225, 30, 40), (255, 205, 0), (205, 208, 214), (255, 0, 200)


def coco_check(tree):
    tree.write()
    return check_coco([("val", tree.annotation_file, tree.image_folder)])


def drawn(check, kind):
    return draw_finding(check.report.first(kind), check)


def share(picture, colour):
    return float((picture == colour).all(axis=2).mean())


@pytest.mark.parametrize(
    ("bbox", "kind", "shows_outside"),
    [
        ([40.0, 20.0, 11.0, 9.0], "box-off-mask", False),
        ([90.0, 6.0, 20.0, 9.0], "box-outside", True),
        ([-900.0, 6.0, 20.0, 9.0], "box-outside", True),
        ([4.0, 6.0, 0.0, 9.0], "box-degenerate", False),
        ([1e308, 6.0, 1e308, 9.0], "box-outside", True),
    ],
)
def test_box_polygon_and_what_lies_outside_are_in_sight(bbox, kind, shows_outside, coco_tree):
    coco_tree.content["annotations"][0]["bbox"] = bbox
    picture = drawn(coco_check(coco_tree), kind)
    assert picture.dtype == np.uint8 and 418 <= max(picture.shape) <= 422
    assert share(picture, YELLOW) > 0
    assert (share(picture, GREY) > 0) == shows_outside
    if abs(bbox[0]) < 100:
        assert share(picture, RED) > 0


def test_run_lengths_tint_the_image(coco_tree):
    coco_tree.content["annotations"][2]["area"] = 5000
    check = coco_check(coco_tree)
    finding = next(finding for finding in check.report.findings if finding.annotation_id == 15)
    with_mask = draw_finding(finding, check)
    coco_tree.content["annotations"][2]["segmentation"] = None
    without = draw_finding(finding, coco_check(coco_tree))
    assert with_mask.shape == without.shape and (with_mask != without).any()


def test_object_of_a_damaged_picture_is_drawn_without_it(coco_tree):
    (coco_tree.image_folder / "picture_0.png").write_bytes(b"")
    coco_tree.content["annotations"][0]["bbox"] = [40.0, 20.0, 11.0, 9.0]
    check = coco_check(coco_tree)
    picture = drawn(check, "box-off-mask")
    assert share(picture, RED) > 0 and share(picture, (240, 241, 244)) > 0.5
    assert drawn(check, "picture-empty") is None


@pytest.mark.parametrize("value", [None, "x", {}, {"image_id": 404}, {"image_id": [3], "bbox": {}}])
def test_anything_in_the_file_can_be_asked_for(value, coco_tree):
    coco_tree.content["annotations"][0] = value
    check = coco_check(coco_tree)
    for finding in check.report.findings:
        draw_finding(finding, check)
    assert draw_finding(Finding("file-unreadable", "none", "f", "r"), check) is None


def test_pictures_that_are_alike_stand_side_by_side(coco_tree):
    Image.open(coco_tree.image_folder / "picture_0.png").save(coco_tree.image_folder / "copy.png")
    coco_tree.content["images"].append({**coco_tree.content["images"][0], "id": 99, "file_name": "copy.png"})
    picture = drawn(coco_check(coco_tree), "picture-repeated")
    assert picture.shape[1] > 2 * 67


def test_turned_picture_is_shown_both_ways(coco_tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = coco_tree.image_folder / "picture_0.png"
    Image.open(path).save(path, exif=exif)
    check = coco_check(coco_tree)
    picture = drawn(check, "picture-turned")
    assert picture.shape[0] > 67 and picture.shape[1] > 67 + 41
    path.write_bytes(path.read_bytes()[:-500])
    assert drawn(check, "picture-turned") is None


def test_unknown_values_are_magenta(semantic_tree):
    check = check_semantic(find_semantic_folders(semantic_tree.root), LabelMap(("a", "b", "c", "d"), (0, 1, 2, 3)))
    finding = check.report.first("label-values")
    values = np.array(Image.open(finding.file))
    picture = draw_finding(finding, check)
    assert int((picture == MAGENTA).all(axis=2).sum()) == int((values == 4).sum()) > 0


def test_label_picture_of_colours_is_shown(semantic_tree):
    path = semantic_tree.label_folder / "scene_0.png"
    Image.open(path).convert("L").convert("RGB").save(path)
    (semantic_tree.label_folder / "scene_1.png").unlink()
    check = check_semantic(find_semantic_folders(semantic_tree.root))
    assert drawn(check, "label-colours").shape[1] > 2 * 67
    assert drawn(check, "partner-missing") is None
