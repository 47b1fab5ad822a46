import json

import pytest

from swin_dense.datasets.check_findings import KINDS, Finding, Report, kinds_by_position, listed, shown


def test_report_counts_errors_first_and_is_json():
    report = Report([Finding("box-loose", "s", "f", "r", count=3), Finding("picture-missing", "s", "f", "r", 7)])
    assert list(report.counts().items()) == [("picture-missing", 1), ("box-loose", 3)]
    assert (report.num_errors, report.num_notes) == (1, 3) and report.first("box-loose").count == 3
    content = json.loads(json.dumps(report.to_dict()))
    assert content["kinds"]["picture-missing"]["severity"] == "error"
    assert content["findings"][1] == {
        "severity": "error",
        "kind": "picture-missing",
        "split": "s",
        "file": "f",
        "reason": "r",
        "image_id": 7,
        "annotation_id": None,
        "entry": None,
        "other": None,
        "count": 1,
    }


def test_unknown_kind_is_refused():
    with pytest.raises(KeyError, match="box-lose"):
        Finding("box-lose", "s", "f", "r")


def test_kinds_have_words():
    assert all(kind.meaning and kind.cleaned for kind in KINDS.values())


def test_kinds_by_position_are_those_of_one_section_of_one_split():
    entries = [("train", ("images", 0)), ("train", ("annotations", 0)), ("val", ("images", 0)), ("train", None)]
    found = [Finding("image-invalid", split, "f", "r", entry=entry) for split, entry in entries]
    found.append(Finding("picture-turned", "train", "f", "r", entry=("images", 0)))
    assert kinds_by_position(found, "train", "images") == {0: {"image-invalid", "picture-turned"}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("a" * 10**6, f"'{'a' * 59}…"),
        (10**5000, "a int too large to print"),
        (["\ud800"], "['\\ud800']"),
        (list(range(10**6)), f"{str(list(range(61)))[:60]}…"),
    ],
    ids=range(5),
)
def test_values_are_shown_short_and_printable(value, text):
    assert shown(value) == text
    shown(value).encode()


def test_listed_says_how_many_more():
    assert listed(["a", "b"]) == "a, b" and listed(list("abc"), limit=2) == "a, b and 1 more"
