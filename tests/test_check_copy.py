import json

import pytest

from swin_dense.datasets.check_copy import Change, first_of, place_file, place_folder, require_new_folder, write_changes
from swin_dense.errors import ConfigError


def test_folder_must_be_new_and_outside(tmp_path):
    require_new_folder(tmp_path / "new", [tmp_path / "data"])
    (tmp_path / "empty").mkdir()
    require_new_folder(tmp_path / "empty", [tmp_path / "data"])
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not empty"):
            require_new_folder(taken, [])
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(ConfigError, match="lies in the data itself"):
        require_new_folder(tmp_path / "link" / "new", [tmp_path / "empty"])


@pytest.mark.parametrize("copy_pictures", [False, True])
def test_files_stand_at_both_places(copy_pictures, tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_text("a")
    place_folder(folder, tmp_path / "out" / "images", ["sub/a.png"], copy_pictures)
    place_folder(folder, tmp_path / "out" / "images", ["sub/a.png"], copy_pictures)
    place_file(folder / "sub" / "a.png", tmp_path / "out" / "more" / "b.png", copy_pictures)
    for copied in (tmp_path / "out" / "images" / "sub" / "a.png", tmp_path / "out" / "more" / "b.png"):
        assert copied.read_text() == "a"
        assert (copied.resolve() == (folder / "sub" / "a.png").resolve()) != copy_pictures


def test_changes_are_written_as_they_are(tmp_path):
    changes = [Change("box-loose", "a.json", "done", 3, "'\\ud800'")]
    assert write_changes(tmp_path, changes) is changes
    written = json.loads((tmp_path / "changes.json").read_text())
    assert [Change(**entry) for entry in written] == changes


def test_first_is_first_in_the_table():
    assert first_of({"mask-empty", "image-invalid"}, {"mask-empty", "image-invalid", "box-loose"}) == "image-invalid"
    assert first_of({"box-loose"}, {"mask-empty"}) is None
