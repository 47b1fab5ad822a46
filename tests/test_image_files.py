from pathlib import Path

import pytest

from swin_dense.errors import DataError
from swin_dense.tools.image_files import find_images, named_apart


@pytest.fixture
def tree(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "deep/er/c.webp", "other.dat"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_folders_give_their_pictures_sorted(tree):
    assert find_images([tree]) == [tree / "a.png", tree / "b.JPG", tree / "deep" / "er" / "c.webp"]


def test_files_are_taken_as_they_are_and_in_order(tree):
    assert find_images([tree / "other.dat", tree / "a.png"]) == [tree / "other.dat", tree / "a.png"]


def test_missing_path_is_named(tree):
    with pytest.raises(DataError, match=r"nowhere\.png: there is no such picture or folder"):
        find_images([tree / "a.png", tree / "nowhere.png"])


def test_folder_without_pictures_is_named(tree):
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no pictures found; looked for \.jpg, "):
        find_images([tree / "empty"])


def test_names_are_unique_and_plain_where_they_can_be():
    paths = [Path(name) for name in ("x/a.png", "y/a.png", "a.jpg", "a_2.png", "b.c.png")]
    names = named_apart(paths)
    assert names[0] == "a" and names[-1] == "b.c"
    assert len(set(names)) == len(paths)
    assert named_apart([*paths, paths[0]])[: len(paths)] == names
