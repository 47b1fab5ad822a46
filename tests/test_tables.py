import json

import pytest

from swin_dense.errors import ConfigError
from swin_dense.tools.tables import counted, per_class_table, print_sentences, print_table, require_writable, write_json


def test_print_table_shows_names_values_and_gaps(capsys):
    print_table("the title", {"mIoU": 0.12345, "mAcc": None})
    shown = capsys.readouterr().out
    assert shown.startswith("the title\n")
    assert "0.123" in shown and "n/a" in shown
    assert len(shown.splitlines()) == 1 + 2 + 2  # no row of empty headings


def test_print_table_of_several_columns(capsys):
    print_table("by class", {"dog": {"box_AP": 0.5, "mask_AP": 0.25}, "cat": {"box_AP": None, "mask_AP": None}})
    lines = capsys.readouterr().out.splitlines()
    assert any("box AP" in line and "mask AP" in line for line in lines)
    dog = next(line for line in lines if "dog" in line)
    assert dog.index("0.500") < dog.index("0.250")
    assert next(line for line in lines if "cat" in line).count("n/a") == 2


def test_print_table_takes_names_literally(capsys):
    names = ["wall [indoor]", "[/b]", "a :smile: b"]
    print_table("runs/[x]/best", dict.fromkeys(names, 0.5))
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*names, "runs/[x]/best"])


def test_print_table_never_breaks_a_long_title(capsys):
    title = "/a/very/long/path/" * 12
    print_table(title, {"a": 1.0})
    assert title in capsys.readouterr().out.splitlines()


def test_print_table_without_rows_is_a_table(capsys):
    print_table("nothing", {})
    assert "nothing" in capsys.readouterr().out


def test_per_class_table_leaves_out_classes_without_ground_truth():
    per_class = {"a": None, "b": {"IoU": 0.0, "F1": None}, "c": {"IoU": None, "F1": None}}
    assert per_class_table({"per_class": per_class}) == {"b": {"IoU": 0.0, "F1": None}}
    assert per_class_table({"per_class": {"a": None}}) == {}


def test_counts_have_their_noun():
    assert [counted(count, "class", "classes") for count in (0, 1, 1234)] == ["0 classes", "1 class", "1,234 classes"]


def test_write_json_makes_the_folder_and_reads_back(tmp_path):
    content = {"mIoU": 0.1 + 0.2, "none": None, "names": ["é"]}
    path = tmp_path / "new" / "scores.json"
    write_json(path, content)
    assert json.loads(path.read_text()) == content and path.read_text().endswith("\n")
    write_json(None, content)
    assert list(tmp_path.iterdir()) == [path.parent]


def test_per_class_table_can_show_some_scores_only():
    scores = {"per_class": {"a": None, "b": {"IoU": 0.5, "accuracy": 1.0}}}
    assert per_class_table(scores, ("accuracy",)) == {"b": {"accuracy": 1.0}}


def test_print_sentences_are_lines_of_plain_text(capsys):
    print_sentences(["AP is [bold]0[/bold].", ":smile: stays"])
    assert capsys.readouterr().out.splitlines() == ["AP is [bold]0[/bold].", ":smile: stays"]


def test_files_that_cannot_be_written_are_refused_early(tmp_path):
    require_writable(tmp_path / "new" / "folders" / "scores.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "scores.json"):
        with pytest.raises(ConfigError, match="cannot be written; name a file in a folder that can"):
            require_writable(path)
