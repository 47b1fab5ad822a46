import json
import os

import pytest

from swin_dense.datasets.check_coco import check_coco, find_coco_files
from swin_dense.datasets.check_fix_coco import fix_coco
from swin_dense.datasets.coco import CocoDataset
from swin_dense.errors import ConfigError, DataError


def check_of(tree):
    return check_coco([("val", tree.annotation_file, tree.image_folder)])


def cleaned_content(tree, out):
    fix_coco(check_of(tree), out)
    return json.loads((out / "annotations" / tree.annotation_file.name).read_text())


def test_copy_of_usable_data_says_the_same(coco_tree, tmp_path):
    coco_tree.content["info"] = {"year": 2017, "licence": "Zürich"}
    for annotation, area in zip(coco_tree.content["annotations"], (180, 143, 200, 264, 81, 2491), strict=True):
        annotation.update(area=area, attributes={"occluded": True})
    coco_tree.write()
    assert cleaned_content(coco_tree, tmp_path / "out") == coco_tree.content
    assert json.loads((tmp_path / "out" / "changes.json").read_text()) == []


def test_every_change_is_listed_with_its_place(coco_tree, tmp_path):
    coco_tree.content["annotations"][1]["bbox"] = [60.0, 2.0, 11.0, 13.0]
    coco_tree.content["annotations"][1]["area"] = 143
    (coco_tree.image_folder / "picture_1.png").unlink()
    coco_tree.write()
    content = cleaned_content(coco_tree, tmp_path / "out")
    assert [image["id"] for image in content["images"]] == [3, 23, 33]
    assert [entry["id"] for entry in content["annotations"]] == [11, 12, 15, 16]
    assert content["annotations"][1]["bbox"] == [30.0, 2.0, 11.0, 13.0]
    changes = json.loads((tmp_path / "out" / "changes.json").read_text())
    assert [(change["kind"], change["image_id"], change["annotation_id"]) for change in changes] == [
        ("picture-missing", 13, None),
        ("box-off-mask", 3, 12),
    ]
    assert changes[1]["done"] == "bbox is [30.0, 2.0, 11.0, 13.0], from the segmentation"


def test_fault_at_several_places_leaves_the_rest_of_an_annotation(coco_tree, tmp_path):
    first = coco_tree.content["annotations"][0]
    first.update(bbox=None, area="x", iscrowd=None, segmentation=[[1, 2], *first["segmentation"]], attributes={"a": 1})
    coco_tree.write()
    cleaned = cleaned_content(coco_tree, tmp_path / "out")["annotations"][0]
    wanted = {"bbox": [4.0, 6.0, 20.0, 9.0], "area": 180, "iscrowd": 0, "attributes": {"a": 1}, "id": 11}
    assert {key: cleaned[key] for key in wanted} == wanted and len(cleaned["segmentation"]) == 1


def test_same_names_get_the_same_ids_in_all_splits(coco_tree, tmp_path):
    folder = coco_tree.annotation_file.parent
    renumbered = {90: 1, 1: 2, 17: 17}
    content = json.loads(json.dumps(coco_tree.content))
    for entry in content["categories"]:
        entry["id"] = renumbered[entry["id"]]
    for entry in content["annotations"]:
        entry["category_id"] = renumbered[entry["category_id"]]
    content["categories"].append({"id": 90, "name": "emu"})
    os.rename(coco_tree.image_folder, tmp_path / "images")
    (folder / "instances_train2017.json").write_text(json.dumps(content))
    # One folder of pictures for both: all of them are in two splits, unless nobody looks at their pixels.
    check = check_coco(find_coco_files(tmp_path), decode=False)
    assert set(check.report.counts()) & {"categories-differ"}
    changes = fix_coco(check, tmp_path / "out", tmp_path)
    assert {change.kind for change in changes} <= {"categories-differ", "area-differs"}
    train, val = (
        CocoDataset(tmp_path / "out" / "annotations" / f"instances_{name}2017.json", tmp_path / "out" / "images")
        for name in ("train", "val")
    )
    assert train.label_map == val.label_map and set(train.label_map.names) == {"cup", "dog", "cat", "emu"}
    names = [[dataset.label_map.names[label] for label in dataset[0].target["labels"]] for dataset in (train, val)]
    assert names[0] == names[1] == ["cat", "cup", "dog"]


def test_copy_that_is_no_link_needs_the_original_no_more(coco_tree, tmp_path):
    fix_coco(check_of(coco_tree), tmp_path / "out", copy_pictures=True)
    copied = tmp_path / "out" / coco_tree.image_folder.name
    assert not copied.is_symlink() and len(list(copied.iterdir())) == 4
    assert all(not path.is_symlink() for path in copied.iterdir())


def test_folder_that_is_taken_or_part_of_the_data_is_refused(coco_tree):
    check = check_of(coco_tree)
    with pytest.raises(ConfigError, match="is not empty: choose another folder"):
        fix_coco(check, coco_tree.annotation_file.parent)
    with pytest.raises(ConfigError, match="lies in the data itself"):
        fix_coco(check, coco_tree.image_folder / "cleaned")


def test_data_without_anything_usable_has_no_cleaned_copy(coco_tree, tmp_path):
    for path in coco_tree.image_folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"instances_val2017\.json: nothing usable is left"):
        fix_coco(check_of(coco_tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()
