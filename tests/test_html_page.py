from html.parser import HTMLParser

import numpy as np

from swin_dense.tools.html_page import figure, figures, heading, html_table, paragraph, write_html

NASTY = '<script>alert("&")</script>'


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outline_of(path):
    outline = Outline()
    outline.feed(path.read_text(encoding="utf-8"))
    assert not outline.open
    return outline


def test_page_is_whole_and_holds_all_it_shows(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
    parts = [heading("scores", "here"), figures([figure(picture, "a <b>picture</b>"), figure("<svg></svg>", "")]), ""]
    write_html(tmp_path / "new" / "page.html", "a run", parts)
    outline = outline_of(tmp_path / "new" / "page.html")
    (image,) = [attributes for tag, attributes in outline.tags if tag == "img"]
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert ("h2", {"id": "here"}) in outline.tags and ("svg", {}) in outline.tags
    assert not any("http" in str(attributes) for _, attributes in outline.tags)


def test_plain_text_stays_text(tmp_path):
    parts = [heading(NASTY, NASTY), paragraph(NASTY), html_table({NASTY: {NASTY: NASTY}})]
    write_html(tmp_path / "page.html", NASTY, parts)
    outline = outline_of(tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in outline.tags}
    assert outline.text.count(NASTY) == 7  # tab, title, heading, paragraph, column, row and cell


def test_table_shows_values_as_the_terminal_does():
    table = html_table({"cat": {"AP 50": 0.5, "count": 1234}, "dog": {"AP 50": None, "count": 2}})
    assert "<th></th>" in table and "AP 50" in table
    assert table.count("<tr>") == 3 and ">0.500<" in table and ">n/a<" in table and ">1,234<" in table
    assert html_table({"mIoU": 0.25}) == '<table><tr><td>mIoU</td><td class="number">0.250</td></tr></table>'


def test_figure_without_a_picture_is_its_words():
    assert figure(None, "a <b>word</b>") == "<figure><figcaption>a <b>word</b></figcaption></figure>"
