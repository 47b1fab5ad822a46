import pytest

from swin_dense.datasets.check_meant import find_misnamed, pictures_below, whole_id, write_whole_ids


@pytest.mark.parametrize(("value", "meant"), [(7.0, 7), ("7", 7), ("-7", -7), (-0.0, 0), ("007", 7)])
def test_floats_and_texts_stand_for_whole_numbers(value, meant):
    assert whole_id(value) == meant


@pytest.mark.parametrize("value", [7, None, True, 7.5, "7.0", "", "a7", "\u0667", "9" * 19, 1e300, float("nan"), [7]])
def test_ids_and_other_values_stand_for_nothing(value):
    assert whole_id(value) is None


def test_every_id_is_told_and_written_whole():
    content = {
        "categories": [{"id": 1.0}, "x"],
        "images": [{"id": "5"}, {"id": 6}],
        "annotations": [{"id": 3.0, "image_id": "5", "category_id": 1}, {"id": None, "category_id": "a"}],
    }
    told = []
    write_whole_ids(content, lambda *what: told.append(what))
    assert [place[:2] for place in told] == [("categories", 0), ("images", 0), ("annotations", 0), ("annotations", 0)]
    assert told[3][2] == "image_id must be a whole number, got '5'; taken as 5"
    assert content["annotations"] == [{"id": 3, "image_id": 5, "category_id": 1}, {"id": None, "category_id": "a"}]
    write_whole_ids(content, lambda *what: pytest.fail(str(what)))


@pytest.fixture
def folder(tmp_path):
    for name in (
        "a.JPG",
        "deep/B.png",
        "e\u0301.png",
        "twice.png",
        "deep/twice.png",
        "._a.jpg",
        "notes.txt",
        "used.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_pictures_below_are_those_of_subfolders_too_and_none_is_hidden(folder):
    names = sorted(path[len(str(folder)) + 1 :] for path in pictures_below(folder))
    assert names == sorted(["a.JPG", "deep/B.png", "e\u0301.png", "twice.png", "deep/twice.png", "used.png"])


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("a.jpg", "a.JPG"),
        ("train\\a.png", "a.JPG"),
        ("http://place/b.png", "deep/B.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("twice.jpg", None),
        ("used.jpg", None),
        ("none.png", None),
    ],
)
def test_misnamed_picture_is_the_one_that_fits(name, there, folder):
    found = find_misnamed({3: name}, folder, [str(folder / "used.png")])
    assert found == ({} if there is None else {3: there})


def test_picture_that_two_entries_would_mean_is_neither(folder):
    assert find_misnamed({1: "x/a.jpg", 2: "y/a.jpg", 3: "B.jpg"}, folder, []) == {3: "deep/B.png"}
