import pytest

from swin_dense.errors import ConfigError
from swin_dense.tools.benchmark_page import TITLE, read_sections, section_start, write_section

PARTS = ["one\ntwo", "### a row", "|  | ms |\n| --- | ---: |\n| swin-dense | 7 |"]


def test_section_is_read_as_it_was_written(tmp_path):
    page = tmp_path / "new" / "page.md"
    write_section(page, "Backbone, a device", PARTS)
    assert read_sections(page) == {"Backbone, a device": "\n\n".join(PARTS)}
    assert page.read_text().startswith(f"# {TITLE}\n\n") and page.read_text().endswith("computed.\n")


def test_section_takes_the_place_of_its_predecessor_and_leaves_the_others(tmp_path):
    page = tmp_path / "page.md"
    for title in ("Backbone, C", "Backbone, G", "Loading images, C"):
        write_section(page, title, [f"figures of {title}, ß"])
    before = page.read_text()
    write_section(page, "Backbone, G", PARTS)
    assert page.read_text() == before.replace("figures of Backbone, G, ß", "\n\n".join(PARTS))
    assert list(read_sections(page)) == ["Backbone, C", "Backbone, G", "Loading images, C"]
    write_section(page, "Backbone, G", ["figures of Backbone, G, ß"])
    assert page.read_text() == before and page.read_text().count("## How models are measured") == 1


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_page_without_content_has_no_sections(content, tmp_path):
    page = tmp_path / "page.md"
    if content is not None:
        page.write_text(content)
    assert read_sections(page) == {}
    write_section(page, "Backbone, C", PARTS)
    assert list(read_sections(page)) == ["Backbone, C"]


@pytest.mark.parametrize("content", [b"my notes\n", b"# Benchmarks\n\nof mine\n## Backbone, C\n", b"\xff\xd8\xff"])
def test_page_of_something_else_stays(content, tmp_path):
    page = tmp_path / "page.md"
    page.write_bytes(content)
    with pytest.raises(ConfigError, match=r"page\.md: something else wrote this file.*Name another file"):
        write_section(page, "Backbone, C", PARTS)
    assert page.read_bytes() == content


def test_page_that_is_no_text_any_more_stays(tmp_path):
    page = tmp_path / "page.md"
    write_section(page, "Backbone, C", PARTS)
    damaged = page.read_bytes() + b"\xff"
    page.write_bytes(damaged)
    with pytest.raises(ConfigError, match="something else wrote"):
        write_section(page, "Backbone, G", PARTS)
    assert page.read_bytes() == damaged


def test_interrupted_writing_leaves_the_former_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    write_section(page, "Backbone, C", PARTS)
    before = page.read_text()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_section(page, "Backbone, C", ["other"])
    assert page.read_text() == before and list(tmp_path.iterdir()) == [page]


def test_section_begins_with_machine_and_command():
    machine, command = section_start("swin-dense benchmark data", {"date": "2026-01-02", "torch": "2.15"})
    assert machine == "Machine: date 2026-01-02  torch 2.15" and command == "```sh\nswin-dense benchmark data\n```"
