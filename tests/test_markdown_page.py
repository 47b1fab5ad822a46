from swin_dense.tools.markdown_page import (
    markdown_list,
    markdown_page,
    markdown_table,
    read_markdown_table,
    wrapped,
    write_markdown,
)


def test_wrapped_text_has_the_same_words_in_lines_of_120_characters():
    text = " ".join(f"{number}-{'word' * (number % 5)}" for number in range(97)) + " " + "long" * 41
    lines = wrapped(text).splitlines()
    assert " ".join(lines) == text and len(lines) > 2
    assert all(len(line) <= 120 or " " not in line for line in lines)


def test_table_has_a_row_for_each_name_and_numbers_to_the_right():
    table = markdown_table({"first": {"AP": "0.5", "steps": "7"}, "second": {"AP": "n/a", "steps": "11"}})
    assert table.splitlines() == [
        "|  | AP | steps |",
        "| --- | ---: | ---: |",
        "| first | 0.5 | 7 |",
        "| second | n/a | 11 |",
    ]


def test_table_is_read_as_it_was_written():
    rows = {"first, 1": {"a b": "0.5 (0.1 to 0.7)", "c": "n/a"}, "second": {"a b": "", "c": "11"}}
    table = markdown_table(rows)
    assert read_markdown_table(table) == rows
    assert read_markdown_table(f"text\n\n{table}\n\n- text") == rows
    assert read_markdown_table("text\n\n- text") == {}


def test_only_the_first_table_of_a_text_is_read():
    first, second = markdown_table({"a": {"b": "1"}}), markdown_table({"c": {"d": "2"}})
    assert read_markdown_table(f"{first}\n\n{second}") == {"a": {"b": "1"}}


def test_list_has_an_item_for_each_sentence():
    assert markdown_list(["One.", "Two."]) == "- One.\n- Two."
    assert markdown_list([]) == ""


def test_page_keeps_its_parts_apart_and_creates_its_folder(tmp_path):
    page = markdown_page("title", ["one\ntwo", "three"])
    assert page == "# title\n\none\ntwo\n\nthree\n"
    write_markdown(tmp_path / "new" / "page.md", page + "ß")
    assert (tmp_path / "new" / "page.md").read_text(encoding="utf-8") == page + "ß"
