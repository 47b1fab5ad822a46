from swin_dense.tools.markdown_page import markdown_page, markdown_table, wrapped, write_markdown


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


def test_page_keeps_its_parts_apart_and_creates_its_folder(tmp_path):
    page = markdown_page("title", ["one\ntwo", "three"])
    assert page == "# title\n\none\ntwo\n\nthree\n"
    write_markdown(tmp_path / "new" / "page.md", page + "ß")
    assert (tmp_path / "new" / "page.md").read_text(encoding="utf-8") == page + "ß"
