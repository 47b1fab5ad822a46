import json

import numpy as np
import pytest
from PIL import Image

from swin_dense.datasets.coco import CocoDataset, find_coco_split
from swin_dense.datasets.convert_labels import ConvertedLabel
from swin_dense.datasets.convert_objects import ConvertedImage, object_from_run_lengths
from swin_dense.datasets.convert_outputs import (
    SplitCounts,
    Splits,
    new_output,
    read_record,
    require_content,
    write_coco,
    write_labels,
    write_record,
)
from swin_dense.datasets.folders import find_semantic_split
from swin_dense.datasets.labels import LabelMap
from swin_dense.datasets.semantic import SemanticDataset
from swin_dense.errors import ConfigError, DataError

LABELS = LabelMap(("cat", "dog"), (0, 1))
SIZE_HW = (5, 7)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(np.full((*SIZE_HW, 3), number, np.uint8)).save(folder / f"p{number}.png")
    return sorted(folder.iterdir())


def converted_images(pictures):
    each = object_from_run_lengths(1, np.array([3, 20, 12]), SIZE_HW)
    return [ConvertedImage(path, path.name, SIZE_HW, (each,)) for path in pictures]


def converted_labels(pictures):
    values = np.where(np.arange(35).reshape(SIZE_HW) < 9, 255, 1).astype(np.uint8)
    return [ConvertedLabel(path, path.name, values) for path in pictures]


def write_all(root, pictures, splits, to="coco", classes=LABELS.names, **options):
    write, converted = {"coco": (write_coco, converted_images), "labels": (write_labels, converted_labels)}[to]
    with new_output(root, splits, to) as staging:
        counts = write(staging, root, converted(pictures), LABELS, splits, **options)
        write_record(staging, root, "test", to, classes, counts)
    return counts


def test_loaders_find_both_layouts(tmp_path, pictures):
    splits = Splits(held_out=0.4)
    counts = write_all(tmp_path / "coco", pictures, splits)
    for split in ("train", "val"):
        dataset = CocoDataset(*find_coco_split(tmp_path / "coco", split))
        assert len(dataset) == counts[split].images == counts[split].classes["dog"] > 0
        assert not dataset.findings and dataset.label_map == LABELS
    counts = write_all(tmp_path / "labels", pictures, splits, "labels")
    for split in ("train", "val"):
        dataset = SemanticDataset(*find_semantic_split(tmp_path / "labels", split), LABELS)
        assert len(dataset) == counts[split].images
        assert counts[split].classes == {"cat": 0, "dog": 26 * len(dataset), "(ignored)": 9 * len(dataset)}
        assert (dataset.label(0) == 255).sum() == 9


@pytest.mark.parametrize("copy_images", [False, True])
def test_pictures_are_relative_links_that_resolve_or_copies(tmp_path, pictures, copy_images):
    before = [path.read_bytes() for path in pictures]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_all(tmp_path / "link" / "out", pictures, Splits(), copy_images=copy_images)
    placed = sorted((tmp_path / "link" / "out" / "images" / "train").iterdir())
    assert [path.read_bytes() for path in placed] == before == [path.read_bytes() for path in pictures]
    assert all(path.is_symlink() != copy_images for path in placed)
    if not copy_images:
        assert not any(path.readlink().is_absolute() for path in placed)


def test_splits_are_added_one_after_the_other_but_never_replaced(tmp_path, pictures):
    out = tmp_path / "out"
    write_all(out, pictures[:9], Splits("train"), "labels")
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    write_all(out, pictures[9:], Splits("val"), "labels")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert read_record(out)["splits"] == {"train": {"from": "test", "images": 9}, "val": {"from": "test", "images": 11}}
    with pytest.raises(DataError, match="the split 'val' is there already, and nothing is replaced"):
        write_all(out, pictures, Splits("val"), "labels")
    with pytest.raises(DataError, match="holds a conversion to labels, wanted coco"):
        write_all(out, pictures, Splits("val"))
    assert not list(out.glob(".convert-*"))


def test_other_classes_in_the_second_split_are_refused(tmp_path, pictures):
    out = tmp_path / "out"
    write_all(out, pictures[:9], Splits("train"))
    before = sorted(out.rglob("*"))
    with pytest.raises(DataError, match=r"has the classes \['cat', 'dog'\], this one \['cat', 'cow'\]"):
        write_all(out, pictures[9:], Splits("val"), classes=("cat", "cow"))
    assert sorted(out.rglob("*")) == before


def test_foreign_folders_and_files_are_refused(tmp_path, pictures):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="the folder is not empty, and nothing in it is replaced"):
        write_all(foreign, pictures, Splits())
    with pytest.raises(DataError, match="wanted a new folder, got a file"):
        write_all(foreign / "thesis.tex", pictures, Splits())
    (foreign / "convert.json").write_text("[]")
    with pytest.raises(DataError, match=r"convert\.json: cannot be read"):
        write_all(foreign, pictures, Splits())
    assert sorted(path.name for path in foreign.iterdir()) == ["convert.json", "thesis.tex"]


def test_an_error_leaves_nothing_behind(tmp_path, pictures):
    for root, existed in ((tmp_path / "new", False), (tmp_path / "empty", True)):
        if existed:
            root.mkdir()
        with pytest.raises(KeyboardInterrupt), new_output(root, Splits(), "coco") as staging:
            write_coco(staging, root, converted_images(pictures), LABELS, Splits())
            raise KeyboardInterrupt
        assert root.exists() == existed and not (existed and list(root.iterdir()))


def test_two_pictures_of_one_name_are_refused(tmp_path, pictures):
    images = [*converted_images(pictures[:2]), *converted_images(pictures[1:2])]
    with pytest.raises(DataError, match=r"a second picture of the name 'p1\.png'"):
        write_coco(tmp_path / "s", tmp_path / "out", images, LABELS, Splits())


def test_class_names_that_do_not_read_back_are_refused(tmp_path, pictures):
    label_map = LabelMap(("a\nb", "c"), (0, 1))
    with pytest.raises(DataError, match="cannot stand one in each line"):
        write_labels(tmp_path, tmp_path / "out", converted_labels(pictures[:1]), label_map, Splits())


def test_held_out_images_keep_their_split_when_others_are_added():
    splits = Splits(held_out=0.25)
    chosen = {f"{number}.jpg": splits.of(f"{number}.jpg") for number in range(2000)}
    assert 0.2 < sum(split == "val" for split in chosen.values()) / 2000 < 0.3
    assert all(Splits(held_out=0.5).of(name) == "val" for name, split in chosen.items() if split == "val")
    assert {Splits("val").of(name) for name in chosen} == {"val"}


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan")])
def test_shares_out_of_range_are_refused(held_out):
    with pytest.raises(ConfigError, match="--held-out must be a share from 0 to below 1"):
        Splits(held_out=held_out)
    with pytest.raises(ConfigError, match="--held-out makes both splits"):
        Splits("val", 0.5)


def test_every_split_needs_images_and_something_in_them():
    require_content({"train": SplitCounts(3, 2)}, "an object")
    with pytest.raises(DataError, match="no image is in split 'val'"):
        require_content({"train": SplitCounts(3, 2), "val": SplitCounts()}, "an object")
    with pytest.raises(DataError, match="none of the 3 images of split 'train' has an object"):
        require_content({"train": SplitCounts(3, 3)}, "an object")


def test_annotation_file_is_plain_json(tmp_path, pictures):
    write_all(tmp_path / "out", pictures, Splits())
    content = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert set(content) == {"images", "annotations", "categories"} and len(content["images"]) == 20
