import gc
import json

import pytest

from swin_dense.datasets.coco_json import (
    collection_paused,
    find_coco_split,
    read_categories,
    read_coco_json,
    read_images,
)
from swin_dense.errors import AnnotationError, DataError

WHOLE = json.dumps({"images": [{}], "annotations": [{}], "categories": [{}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is empty"),
        (WHOLE[:-9].encode(), "cut short at line 1"),
        (b'{"images": [1, 2', "cut short at line 1"),
        (b'{"images": [1,, 2], "annotations": []}', "not valid JSON at line 1, column 15"),
        (b"<!doctype html><html></html>", "got a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 5000, "cannot be read .Exceeds the limit"),
        ('{"name": "Gr\u00fcn"}'.encode("latin-1"), "wanted JSON in UTF-8, byte 12 is not"),
        (b'[{"image_id": 1, "score": 0.5}]', "got a results file"),
        (b"[]", "got a list"),
        (b"7", "got int at the top"),
        (b'{"annotations": [1], "categories": [1]}', "the key 'images' is missing"),
        (b'{"images": [1], "categories": [1]}', "the key 'annotations' is missing"),
        (b'{"images": [1], "annotations": [], "categories": [1]}', "'annotations' must be .* got an empty list"),
        (b'{"images": {}, "annotations": [1], "categories": [1]}', "'images' must be a list .* got dict"),
        (b'{"images": [1], "images": [2], "annotations": [1]}', "the key 'images' stands twice"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "instances.json"
    path.write_bytes(text)
    with pytest.raises(AnnotationError, match=f"instances.json: .*{message}"):
        read_coco_json(path)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(AnnotationError, match="there is no such file"):
        read_coco_json(tmp_path / "none.json")
    with pytest.raises(AnnotationError, match="got a folder"):
        read_coco_json(tmp_path)


def test_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert read_coco_json(path) == json.loads(WHOLE)


def test_categories_are_ordered_by_id():
    labels = read_categories("a.json", [{"id": 7, "name": "b"}, {"id": 0, "name": "a"}])
    assert labels.names == ("a", "b") and labels.raw_ids == (0, 7)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": "1", "name": "a"}], r"categories\[0\] needs a whole number as id"),
        ([{"id": 1}], "category id=1 needs a name, got None"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "raw id 1 stands for two classes"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "name 'a' stands for two classes"),
    ],
)
def test_bad_categories_are_refused(categories, message):
    with pytest.raises(AnnotationError, match=f"a.json: .*{message}"):
        read_categories("a.json", categories)


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../b.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "", None, 7]
)
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    image = {"id": 5, "file_name": name, "width": 7, "height": 5}
    with pytest.raises(AnnotationError, match=r"a.json: image id=5: file_name must"):
        read_images("a.json", [image], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "5"}, r"images\[0\]: id must be a whole number, got '5'"),
        ({"width": 0}, "image id=5: width must be a whole number of pixels, at least 1, got 0"),
        ({"height": "7"}, "image id=5: height must be a whole number of pixels, at least 1, got '7'"),
        ({"height": 1e400}, "height must be .* got inf"),
    ],
)
def test_bad_image_entries_are_refused(tmp_path, changes, message):
    image = {"id": 5, "file_name": "a.png", "width": 7, "height": 5, **changes}
    with pytest.raises(AnnotationError, match=message):
        read_images("a.json", [image], tmp_path)


def test_repeated_image_ids_are_listed(tmp_path):
    images = [{"id": n // 2, "file_name": "a.png", "width": 7, "height": 5} for n in range(4)]
    with pytest.raises(AnnotationError, match=r"repeated are \[0, 1\]"):
        read_images("a.json", images, tmp_path)


@pytest.mark.parametrize("file_name", ["instances_val2017.json", "instances_val.json", "instances_validation.json"])
@pytest.mark.parametrize("image_folder", ["val2017", "images/val", "images"])
@pytest.mark.parametrize("in_subfolder", [True, False])
def test_split_is_found_in_usual_layouts(tmp_path, file_name, image_folder, in_subfolder):
    annotations = tmp_path / "annotations" if in_subfolder else tmp_path
    annotations.mkdir(exist_ok=True)
    (annotations / file_name).touch()
    (tmp_path / image_folder).mkdir(parents=True)
    assert find_coco_split(tmp_path, "val") == (annotations / file_name, tmp_path / image_folder)


def test_missing_split_lists_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "coco.zip").touch()
    with pytest.raises(DataError, match=r"Looked for: annotations/instances_train2017\.json, .* Got: coco\.zip"):
        find_coco_split(tmp_path, "train")
    (tmp_path / "instances_train.json").touch()
    with pytest.raises(DataError, match=r"image folder of split 'train' not found. Looked for: train2017, "):
        find_coco_split(tmp_path, "train")
    with pytest.raises(DataError, match="split must be 'train' or 'val', got 'test'"):
        find_coco_split(tmp_path, "test")


@pytest.mark.parametrize(
    "name", ["a.png", "train/a.b/c.png", "a b.png", "a\u20ac.png", ".hidden.png", "ab:c.png", "a..b.png"]
)
def test_file_names_inside_the_folder_are_kept(tmp_path, name):
    images = read_images("a.json", [{"id": 5, "file_name": name, "width": 7, "height": 5}], tmp_path)
    assert list(images.file_names) == [name]


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_of_garbage_is_afterwards_as_it_was(enabled):
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError), collection_paused():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
