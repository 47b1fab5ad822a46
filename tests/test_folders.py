import pytest

from swin_dense.datasets.folders import (
    describe_folder,
    files_ending_in,
    find_semantic_split,
    first_existing,
    split_names,
)
from swin_dense.errors import DataError


def test_first_existing_takes_the_first_that_is_there(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    paths = [tmp_path / name for name in "abc"]
    assert first_existing(paths, lambda path: path.is_dir()) == tmp_path / "b"
    assert first_existing(paths[:1], lambda path: path.is_dir()) is None


def test_describe_folder_lists_what_is_there(tmp_path):
    assert describe_folder(tmp_path) == "an empty folder"
    assert describe_folder(tmp_path / "none") == "no such folder"
    for name in ("b.png", "a.png"):
        (tmp_path / name).touch()
    assert describe_folder(tmp_path) == "a.png, b.png"


def test_only_train_and_val_are_splits():
    assert "train2017" in split_names("train") and "validation" in split_names("val")
    with pytest.raises(DataError, match="split must be 'train' or 'val', got 'test'"):
        split_names("test")


def test_files_of_a_folder_are_those_of_its_kinds_sorted_and_not_hidden(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in files_ending_in(tmp_path, (".png", ".jpg"))] == ["a.JPG", "b.png"]


def test_split_is_found_and_flat_folders_serve_both(semantic_tree, tmp_path):
    expected = (semantic_tree.image_folder, semantic_tree.label_folder)
    assert find_semantic_split(semantic_tree.root, "train") == expected
    with pytest.raises(DataError, match=r"split 'val' not found. Looked for .* in images: training"):
        find_semantic_split(semantic_tree.root, "val")
    flat = tmp_path / "flat"
    for kind in ("images", "annotations"):
        (flat / kind).mkdir(parents=True)
        (flat / kind / "a.png").touch()
    for split in ("train", "val"):
        assert find_semantic_split(flat, split) == (flat / "images", flat / "annotations")
